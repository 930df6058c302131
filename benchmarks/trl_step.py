"""A training step of TRL's GRPOTrainer on the embedded task: python -m benchmarks.trl_step --prompts TRAIN.parquet

The prompts are what `iapo data verbose_arithmetic --out DIR` writes. All else is as in `python -m iapo.train
variant=grpo platform=cpu model=tiny data=verbose_arithmetic`, but for two things. TRL generates by transformers, where
verl has vLLM. And it has no forward for the old log-probabilities: with one update per generation they are the new
ones. One line of JSON says how long steps took, and with which settings and versions.

TRL wants a newer transformers than verl allows, so it gets an environment of its own, in a temporary folder or in
--venv. There this file runs as a script with --here, and finds nothing of this repository to import.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path

TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PACKAGES = ("trl==1.16.*", "transformers==5.24.*", "datasets")
TINY = Path(__file__).resolve().parents[1] / "iapo" / "assets" / "tiny"

PROMPTS, GROUP, MAX_COMPLETION = 16, 8, 128
MARKERS = ("<think>", "</think>", "<answer>", "</answer>")
PARTS = ("generate", "reference", "loss", "backward")
INTERVAL_S = 20
BUSY = 0.1  # cores that others use


class TrlError(RuntimeError):
    """TRL could not be installed or did not run; the message is one line."""


def measure(steps: int, prompts_file: Path, model_dir: Path = TINY, **options) -> list[float]:
    """Seconds of each step, the first one, which warms up, included; for `options` see `run_trl`."""
    return run_trl(steps, prompts_file, model_dir, **options)["seconds"]


def run_trl(
    steps: int,
    prompts_file: Path,
    model_dir: Path = TINY,
    *,
    venv: Path | None = None,
    threads: int = 2,
    per_device: int = PROMPTS * GROUP,
    passive: bool = False,
) -> dict:
    """What `train` returns, run in an environment that has TRL.

    Args:
        steps: optimiser steps, at least 2.
        prompts_file: the task's train.parquet.
        model_dir: a model and its tokenizer.
        venv: where the environment is, or is made and kept; None means a temporary one.
        threads: of torch.
        per_device: completions per forward and backward of the loss.
        passive: threads sleep while they wait for each other. That is a quarter slower. But by default they spin, and
            then a step takes ten times as long and more where other processes want the cores.

    Raises:
        TrlError: the installation or the training failed.
    """
    with contextlib.ExitStack() as stack:
        if venv is None:
            venv = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trl-"))) / "venv"
        python = prepare(venv)
        # -I: else the folder of this file comes first on the path, and its modules hide others of the same name.
        command = [str(python), "-I", str(Path(__file__).resolve()), "--here", "--steps", str(steps)]
        command += ["--prompts", str(Path(prompts_file).resolve()), "--model", str(Path(model_dir).resolve())]
        command += ["--threads", str(threads), "--per-device", str(per_device)]
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if passive:
            environment["OMP_WAIT_POLICY"] = "passive"
        result = parse_result(watched(command, f"timing {steps} steps of TRL", environment))
    if (result["cores_busy_with_others"] or 0.0) > BUSY and not passive:
        others = f"other processes kept {result['cores_busy_with_others']} cores busy"
        print(f"trl_step: {others}, so TRL's times mean nothing; try again, or with --passive", file=sys.stderr)
    return result


def prepare(venv: Path) -> Path:
    """The Python of an environment with TRL, which is made where it isn't there yet."""
    python = venv.absolute() / "bin" / "python"
    if has_trl(python):
        return python
    watched([sys.executable, "-m", "venv", str(venv)], "making an environment for TRL")
    from_cpu_index, everything = pip_commands(python)
    # Where that index doesn't answer, whatever torch of this version pip finds is taken.
    with contextlib.suppress(TrlError):
        watched(from_cpu_index, "installing torch for TRL")
    watched(everything, "installing TRL")
    return python


def has_trl(python: Path) -> bool:
    """Whether it is installed there; pip installs it after all that it needs."""
    command = [str(python), "-I", "-c", "from importlib import metadata; metadata.version('trl')"]
    return python.exists() and subprocess.run(command, capture_output=True).returncode == 0


def pip_commands(python: Path) -> list[list[str]]:
    """The CPU build of torch first, so that the CUDA build and its gigabytes are never fetched; then the rest."""
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    quickly = ["--retries", "0", "--timeout", "20"]
    return [
        [*install, *quickly, f"torch=={TORCH}+cpu", "--extra-index-url", CPU_INDEX],
        [*install, f"torch=={TORCH}", *PACKAGES],
    ]


def watched(command: list[str], what: str, environment: Mapping[str, str] | None = None) -> str:
    """The standard output of a command, with a sign of life on stderr while it runs.

    Raises:
        TrlError: it failed; what it wrote to stderr is on ours.
    """
    start = time.monotonic()
    environment = {**os.environ, **(environment or {})}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        try:
            while True:
                print(f"trl_step: {what} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output, errors = process.communicate(timeout=INTERVAL_S)
                    break
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        print(errors, end="", file=sys.stderr, flush=True)
        raise TrlError(f"{what} failed: {reason(errors)} (exit status {process.returncode})")
    return output


def reason(errors: str) -> str:
    """The line that says why: pip's last error, or what a traceback ends with."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return ([line for line in lines if line.startswith("ERROR:")] or lines or ["it said nothing"])[-1]


def parse_result(output: str) -> dict:
    """The JSON in the last line of an output."""
    try:
        return json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise TrlError(f"TRL's run printed no result but {output[-80:]!r}") from error


def reward(text: str, ground_truth: str) -> float:
    """As iapo.reward, for integers: +-1 for the answer, +-0.5 for the form."""
    blocks = [part.rsplit("<answer>", 1)[1] for part in text.split("</answer>")[:-1] if "<answer>" in part]
    right = len(blocks) == 1 and same_integer(blocks[0], ground_truth)
    return (1.0 if right else -1.0) + (0.5 if well_formed(text) else -0.5)


def well_formed(text: str) -> bool:
    """Whether it is `<think> ... </think>\\n<answer> ... </answer>` and nothing else."""
    text = text.strip()
    return (
        all(text.count(marker) == 1 for marker in MARKERS)
        and text.startswith("<think>")
        and "</think>\n<answer>" in text
        and text.endswith("</answer>")
    )


def same_integer(a: str, b: str) -> bool:
    try:
        return int(a) == int(b)
    except ValueError:
        return False


def rewards(completions: list[list[dict]], ground_truth: list[str], **_) -> list[float]:
    """A reward function as TRL calls it: completions are chats of one message."""
    return [reward(chat[0]["content"], truth) for chat, truth in zip(completions, ground_truth, strict=True)]


def examples(rows: Iterable[Mapping]) -> list[dict]:
    """The task's rows as TRL wants them: other columns than the prompt are arguments of the reward function."""
    return [{"prompt": row["prompt"], "ground_truth": row["reward_model"]["ground_truth"]} for row in rows]


def config_arguments(steps: int, per_device: int) -> dict:
    """Arguments of GRPOConfig that make it the configuration of variant=grpo platform=cpu model=tiny."""
    return {
        "max_steps": steps,
        "seed": 0,
        # One optimiser step per generation of all the completions, however many go through the loss at a time.
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": PROMPTS * GROUP // per_device,
        "num_iterations": 1,
        "num_generations": GROUP,
        "max_completion_length": MAX_COMPLETION,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "use_vllm": False,
        # The mean over all tokens of the step, which verl calls token-mean; bnpo would be one per device batch.
        "loss_type": "dapo",
        "scale_rewards": "group",
        "epsilon": 0.2,
        "beta": 0.001,
        # verl has no importance weight on its KL.
        "use_bias_correction_kl": False,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def settings(arguments: Mapping, model: str, threads: int, optimiser: str) -> dict:
    """What a reader must know to compare a step with another one."""
    a = arguments
    adam = {key: a[key] for key in ("learning_rate", "adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm")}
    return {
        "model": model,
        "prompts": PROMPTS,
        "completions_per_prompt": a["num_generations"],
        "completions_per_forward": a["per_device_train_batch_size"],
        "max_completion_tokens": a["max_completion_length"],
        "sampling": {key: a[key] for key in ("temperature", "top_p", "top_k")},
        "dtype": a["model_init_kwargs"]["dtype"],
        "attention": a["model_init_kwargs"]["attn_implementation"],
        "threads": threads,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "kl": a["beta"],
        "optimiser": {"name": optimiser, "schedule": a["lr_scheduler_type"], "warmup_steps": a["warmup_steps"], **adam},
        "loss_type": a["loss_type"],
        "scale_rewards": a["scale_rewards"],
        "generation": "vllm" if a["use_vllm"] else "transformers",
    }


class Stopwatch:
    """Seconds of every step and of the parts of it that are known by name."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        self._parts, self._start = dict.fromkeys(PARTS, 0.0), time.perf_counter()

    def end(self) -> None:
        self.steps.append({"step": time.perf_counter() - self._start, **self._parts})

    def timed(self, part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed_function(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._parts[part] += time.perf_counter() - start

        return timed_function


def summary(steps: list[Mapping[str, float]], logs: list[Mapping[str, float]]) -> dict:
    """Seconds of all steps; medians and means without the first one, which warms up."""
    parts = {part: statistics.median(step[part] for step in steps[1:]) for part in PARTS}
    rest = statistics.median(step["step"] - sum(step[part] for part in PARTS) for step in steps[1:])
    return {
        "seconds": [round(step["step"], 3) for step in steps],
        "median_seconds": round(statistics.median(step["step"] for step in steps[1:]), 3),
        "median_seconds_of_parts": {name: round(value, 3) for name, value in {**parts, "rest": rest}.items()},
        "mean_completion_tokens": round(statistics.mean(log["completions/mean_length"] for log in logs[1:]), 1),
        "mean_reward": round(statistics.mean(log["reward"] for log in logs[1:]), 3),
    }


def cpu_seconds_of_others() -> float | None:
    """What all other processes have used of this machine's cores; None where it isn't Linux."""
    if sys.platform != "linux":
        return None
    user, nice, system, _idle, _iowait, *interrupts_and_stolen = Path("/proc/stat").read_text().split()[1:9]
    used = sum(map(int, (user, nice, system, *interrupts_and_stolen))) / os.sysconf("SC_CLK_TCK")
    return used - sum(os.times()[:2])


def train(steps: int, prompts_file: Path, model_dir: Path, threads: int, per_device: int) -> dict:
    """Train by TRL in this very process: `summary`, settings and versions."""
    import pyarrow.parquet
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    watch, step_logs = Stopwatch(), []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            watch.begin()

        def on_step_end(self, *_, **__):
            watch.end()

        def on_log(self, *_, logs: dict, **__):
            step_logs.append(dict(logs))

    arguments = config_arguments(steps, per_device)
    rows = pyarrow.parquet.read_table(prompts_file, columns=["prompt", "reward_model"]).to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(model_dir),
            args=GRPOConfig(output_dir=folder, **arguments),
            reward_funcs=rewards,
            train_dataset=Dataset.from_list(examples(rows)),
            processing_class=AutoTokenizer.from_pretrained(model_dir, padding_side="left"),
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)
        # What TRL has for this reports to experiment trackers only.
        trainer.model.generate = watch.timed("generate", trainer.model.generate)
        trainer.ref_model.forward = watch.timed("reference", trainer.ref_model.forward)
        trainer.compute_loss = watch.timed("loss", trainer.compute_loss)
        trainer.accelerator.backward = watch.timed("backward", trainer.accelerator.backward)
        torch.set_num_threads(threads)  # after all that might set it
        start, others = time.perf_counter(), cpu_seconds_of_others()
        trainer.train()
        seconds = time.perf_counter() - start
        cores = None if others is None else max(cpu_seconds_of_others() - others, 0.0) / seconds
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    return {
        **summary(watch.steps, [log for log in step_logs if "reward" in log]),
        "cores_busy_with_others": None if cores is None else round(cores, 2),
        "settings": settings(arguments, model_dir.name, torch.get_num_threads(), trainer.args.optim.value),
        "versions": {"python": platform.python_version(), **versions},
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="the task's train.parquet")
    parser.add_argument("--model", type=Path, default=TINY, metavar="DIR", help="default: the embedded model")
    parser.add_argument("--steps", type=int, default=6, help="default: 6; the first one only warms up")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--per-device", type=int, default=PROMPTS * GROUP, help="completions per forward of the loss")
    parser.add_argument("--passive", action="store_true", help="for a busy machine: waiting threads don't spin")
    parser.add_argument("--venv", type=Path, metavar="DIR", help="an environment to use again, made if it isn't there")
    parser.add_argument("--here", action="store_true", help="train in this Python, which has TRL")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first one only warms up")
    if options.per_device < 1 or PROMPTS * GROUP % options.per_device:
        parser.error(f"--per-device must divide {PROMPTS * GROUP}")
    if not options.prompts.is_file():
        parser.error(f"{options.prompts} isn't there; iapo data verbose_arithmetic --out DIR writes it")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    common = {"threads": options.threads, "per_device": options.per_device}
    if options.here:
        with contextlib.redirect_stdout(sys.stderr):  # the result is the only line on stdout
            result = train(options.steps, options.prompts, options.model, **common)
    else:
        try:
            common |= {"venv": options.venv, "passive": options.passive}
            result = run_trl(options.steps, options.prompts, options.model, **common)
        except TrlError as error:
            raise SystemExit(f"benchmarks.trl_step: {error}") from error
    print(json.dumps(result))


if __name__ == "__main__":
    main()
