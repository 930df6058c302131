"""The plugins are inert unless asked for, and complete when they are."""

import os
import subprocess
import sys

import pytest

# One process for each environment, because verl and vLLM take seconds to import. Every print is what one test looks at.
CODE = """
import importlib.metadata, torch.distributed.fsdp as fsdp
import torch.distributed.fsdp._init_utils as init_utils
before = importlib.metadata.version, fsdp.CPUOffloadPolicy.__init__, fsdp.CPUOffload.__init__
states = init_utils._check_module_states_for_sync_module_states
import verl, verl.utils.distributed as distributed
from verl.plugin.platform import PlatformRegistry, get_platform
print(
    "workarounds",
    PlatformRegistry.get("cpu") is not None,
    importlib.metadata.version is before[0],
    fsdp.CPUOffloadPolicy.__init__ is before[1],
    fsdp.CPUOffload.__init__ is before[2],
    init_utils._check_module_states_for_sync_module_states is states,
    hasattr(distributed.initialize_global_process_group_ray, "__wrapped__"),
)
if PlatformRegistry.get("cpu") is not None:
    import torch
    from verl.utils import device
    x = torch.zeros(1).to(device.get_device_id())
    print("platform", device.get_device_name(), f"{device.get_device_name()}:{device.get_device_id()}",
          device.get_nccl_backend(), device.get_resource_name(), x.device, device.get_torch_device().is_available(),
          device.get_torch_device().memory_allocated(), importlib.metadata.version("vllm").endswith("+cpu"))
from vllm.model_executor.layers import utils
original = utils.dispatch_cpu_unquantized_gemm
from iapo.verl_adapter.vllm_plugin import register
register()
print("vllm", utils.dispatch_cpu_unquantized_gemm is original)
"""
# vLLM's own worker starts, but for its devices: which number of threads does it find?
THREADS = """
import os, torch
from types import SimpleNamespace
from vllm.v1.worker.cpu_worker import CPUWorker
CPUWorker.init_device = lambda self: print("threads", torch.get_num_threads())
from iapo.verl_adapter.vllm_plugin import register
register()
os.sched_getaffinity = lambda pid: range(6)
for size in (128, 512):
    CPUWorker.init_device(SimpleNamespace(model_config=SimpleNamespace(get_hidden_size=lambda: size)))
"""

# Linear layers as vLLM makes them: does a weight that is loaded into one, and processed as verl does, act?
RELOAD = """
import torch, torch.nn.functional as F
from vllm.model_executor.layers import utils
from iapo.verl_adapter.vllm_plugin import register
register()
for inputs in (128, 576):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(32, inputs), requires_grad=False)
    x, bias = torch.randn(3, inputs), torch.randn(32)
    for scale in (1, 2):
        layer.weight.data.mul_(scale)
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        found = utils.cpu_unquantized_gemm(layer, x, layer.weight, bias)
        torch.testing.assert_close(found, F.linear(x, layer.weight, bias), atol=1e-4, rtol=1e-4)
        print("reload", inputs, layer.weight.shape[0], layer.cpu_linear is F.linear)
"""


def run(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept | environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


@pytest.fixture(scope="module")
def without():
    return said(run(CODE))


@pytest.fixture(scope="module")
def on_cpu():
    return said(run(CODE, VERL_PLATFORM="cpu", VLLM_TARGET_DEVICE="cpu"))


def said(lines):
    words = [line.split() for line in lines]
    return {first: rest for first, *rest in words if first in ("workarounds", "platform", "vllm")}


@pytest.mark.e2e
def test_nothing_is_touched_without_the_environment_variable(without):
    assert without["workarounds"] == ["False", "True", "True", "True", "True", "False"]


@pytest.mark.e2e
def test_everything_is_in_place_with_it(on_cpu):
    assert on_cpu["workarounds"] == ["True", "False", "False", "False", "False", "True"]


@pytest.mark.e2e
def test_the_platform_answers_what_verl_asks(on_cpu):
    assert on_cpu["platform"] == ["cpu", "cpu:0", "gloo", "GPU", "cpu", "False", "0", "True"]


@pytest.mark.e2e
def test_vllm_keeps_its_own_kernels_without_the_environment_variable(without, on_cpu):
    assert (without["vllm"], on_cpu["vllm"]) == (["True"], ["False"])


@pytest.mark.e2e
def test_a_linear_layer_keeps_its_weight_packed_or_not_and_a_new_one_acts():
    lines = run(RELOAD, VERL_PLATFORM="cpu", VLLM_TARGET_DEVICE="cpu")
    found = [line for line in lines if line.startswith("reload ")]
    assert found == ["reload 128 32 True"] * 2 + ["reload 576 32 False"] * 2


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"VERL_PLATFORM": "cpu", "IAPO_RANKS": "2"}, [1, 3]),
        ({"VERL_PLATFORM": "cpu", "IAPO_RANKS": "2", "IAPO_ALL_CORES": "0"}, [1, 1]),  # the user chose
        ({}, [1, 1]),
    ],
)
def test_vllm_decodes_a_wide_model_with_its_share_of_the_cores(environment, threads):
    lines = run(THREADS, OMP_NUM_THREADS="1", VLLM_TARGET_DEVICE="cpu", **environment)
    assert [int(line.split()[1]) for line in lines if line.startswith("threads ")] == threads


def test_two_runs_on_a_machine_have_sockets_of_their_own():
    code = """
import os
from iapo.verl_adapter.vllm_plugin import register, unique_job_id
register()
register()  # vLLM loads plugins in each process, and processes inherit the environment
print(os.environ.get("VERL_RAY_JOB_ID"), unique_job_id("01000000"))
"""
    assert run(code, VERL_RAY_JOB_ID="01000000", IAPO_RUN_ID="a1") == ["01000000-a1 01000000-a1"]
    assert run(code, VERL_RAY_JOB_ID="01000000", IAPO_RUN_ID="b2") == ["01000000-b2 01000000-b2"]
    assert run(code, VERL_RAY_JOB_ID="01000000") == ["01000000 01000000"]  # no run of iapo.train
    assert run(code, IAPO_RUN_ID="a1") == ["None 01000000-a1"]


def test_a_run_is_refused_where_vllm_would_leave_the_plugin_out(monkeypatch):
    from iapo.launch.checks import ConfigError
    from iapo.launch.machine import check_vllm_plugin

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    check_vllm_plugin()
    monkeypatch.setenv("VLLM_PLUGINS", "other,iapo")
    check_vllm_plugin()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ConfigError, match="VLLM_PLUGINS: 'other' lacks 'iapo'"):
        check_vllm_plugin()
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr("iapo.launch.machine.entry_points", lambda **_: ())
    with pytest.raises(ConfigError, match="its vLLM plugin isn't installed"):
        check_vllm_plugin()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_log_probs_in_blocks_are_verls_bit_for_bit(monkeypatch, dtype):
    import torch
    from verl.utils.torch_functional import logprobs_from_logits_v2

    from iapo.verl_adapter import cpu_workarounds

    monkeypatch.setattr(cpu_workarounds, "NUMBERS_AT_A_TIME", 3 * 11)  # blocks of three tokens
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 11, generator=generator, dtype=torch.float64).to(getattr(torch, dtype)).requires_grad_()
    labels = torch.randint(0, 11, (10,), generator=generator)
    ours, verls = (f(logits, labels) for f in (cpu_workarounds.log_probs_from_logits, logprobs_from_logits_v2))
    assert torch.equal(ours, verls)
    gradients = [torch.autograd.grad(x.square().sum(), logits)[0] for x in (ours, verls)]
    assert torch.equal(*gradients)
    torch.testing.assert_close(ours.float(), logits.float().log_softmax(-1)[range(10), labels], atol=2e-2, rtol=0)
