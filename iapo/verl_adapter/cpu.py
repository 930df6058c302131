"""A CPU platform for verl 0.9.1, so that the real trainer, workers and rollout server run without a GPU.

verl imports this module in every process through the entry-point group `verl.plugins`. It does nothing unless the
environment variable VERL_PLATFORM is "cpu" (`iapo.train` sets it for platform=cpu). verl swallows plugin errors, so
`iapo.train` checks that the platform is registered before it starts Ray.
"""

import os


def requested() -> bool:
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def use_all_cores(ranks: int) -> None:
    """Let the training in this process use its share of the cores instead of one: generation waits while it trains.

    Not where the user chose OMP_NUM_THREADS: `iapo train` then sets IAPO_ALL_CORES=0 (`iapo.launch.machine`).

    Only sensible with the small GOMP_SPINCOUNT that `iapo train` sets. By default threads that wait for work keep the
    cores of other processes busy, and next to another run a step takes several times as long.
    """
    if requested() and os.environ.get("IAPO_ALL_CORES") != "0":
        import torch

        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // ranks, 1))


def register() -> None:
    """Register the platform `cpu` and apply the work-arounds that it needs in this process."""
    import iapo.verl_adapter.cpu_platform
    import iapo.verl_adapter.packed_attention  # noqa: F401, for model.override_config.attn_implementation
    from iapo.verl_adapter import cpu_workarounds

    cpu_workarounds.apply()


if requested():
    register()
