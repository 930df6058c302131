"""The time of a training step: python -m benchmarks.step [--rows] [--against DIR] [--trl] [--real MODEL_DIR DATA_DIR]

By default the forms of the exit-entropy pass and its share of the step. --rows takes the rows of table.yaml instead,
each at the first of its values, and grpo last once more: the two tell how far the machine drifted.

--against compares this checkout with the one in DIR, by grpo and iapo_rate. --trl adds TRL's GRPOTrainer on the same
model and prompts, see `benchmarks.trl_step`. --real takes SmolLM2-135M, as iapo model or iapo warmup writes it, and
data whose answers are integers, such as iapo data gsm8k, instead of the embedded task. Runs that are compared take
turns, --rounds times each, so that a busy time of the machine hits all alike. Only the ratios carry over to other
machines.

Trains a few steps of each on the real stack and prints the medians of verl's own timers, without the first step, which
warms up.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks import trl_step
from benchmarks.measure import machine, table
from benchmarks.table.plan import ROOT, load_methods
from iapo.data import prepare
from iapo.metrics.file import read_metrics

VARIANTS = {
    "grpo": ["variant=grpo"],
    "iapo, every position": ["variant=iapo", "iapo.share_log_prob_forward=false"],
    "iapo, every position, shared": ["variant=iapo", "iapo.share_log_prob_forward=true"],
    "iapo, boundaries": ["variant=iapo", "iapo.probe_at=boundaries", "iapo.share_log_prob_forward=false"],
    "iapo, boundaries, shared": ["variant=iapo", "iapo.probe_at=boundaries", "iapo.share_log_prob_forward=true"],
}
COMPARED = {"grpo": ["variant=grpo"], "iapo_rate": ["variant=iapo_rate"]}
PARTS = ("step", "gen", "old_log_prob", "ref", "update_actor", "exit_entropy")


def rows_of_table() -> dict[str, list[str]]:
    methods = load_methods(ROOT / "benchmarks/table/table.yaml")
    rows = {name: [f"variant={m.variant}", *m.overrides(m.values[0])] for name, m in methods.items() if m.quick}
    return rows | {"grpo, again": rows["grpo"]}


def run(overrides: list[str], steps: int, folder: Path, checkout: Path = ROOT) -> list[dict]:
    """Metrics of steps 2, 3, ... of a run of a checkout's code.

    Raises:
        SystemExit: the run failed; with the end of its log.
    """
    command = [sys.executable, "-m", "iapo.train", "platform=cpu", *overrides, f"run_dir={folder}"]
    command += [f"trainer.total_training_steps={steps}", "trainer.test_freq=-1", "trainer.save_freq=-1"]
    command += ["trainer.val_before_train=false"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "IAPO_DATA_DIR": str(folder.parent / "data")}
    with folder.with_suffix(".log").open("w") as log:
        result = subprocess.run(command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if result.returncode:
        lines = folder.with_suffix(".log").read_text().splitlines()
        raise SystemExit("\n".join(lines[-20:]))
    return [metrics for step, metrics in read_metrics(folder / "metrics.jsonl") if step > 1]


def median(steps: Iterable[dict], key: str) -> float:
    return statistics.median(metrics.get(key, 0.0) for metrics in steps)


def parts_table(runs: dict[str, list[dict]]) -> str:
    """One row per run: seconds of a step and of its parts, and the share of the pass."""
    header = ["seconds of a step", *PARTS, f"/ {next(iter(runs))}", "share of the pass", "probe tok/s", "tokens"]
    first_s = median(next(iter(runs.values())), "timing_s/step")
    rows = []
    for name, steps in runs.items():
        share = statistics.median(m.get("timing_s/exit_entropy", 0.0) / m["timing_s/step"] for m in steps)
        rows.append(
            [
                name,
                *(f"{median(steps, f'timing_s/{part}'):.2f}" for part in PARTS),
                f"{median(steps, 'timing_s/step') / first_s:.2f}",
                f"{100 * share:.1f}%",
                f"{median(steps, 'iapo/probe_tokens_per_second'):,.0f}",
                f"{median(steps, 'response_length/mean'):.1f}",
            ]
        )
    return table(header, rows)


def task_of(options: argparse.Namespace, folder: Path) -> tuple[list[str], Path, dict]:
    """Our overrides, the prompts, and TRL's options for the same task."""
    if not options.real:
        return [], folder / "data" / "verbose_arithmetic" / "train.parquet", {}
    model, data = (path.absolute() for path in options.real)
    overrides = ["model=smollm2-135m-instruct", f"actor_rollout_ref.model.path={model}", f"data={data}"]
    return [*overrides, "iapo.score=auto"], data / "train.parquet", {"model_dir": model, "work": "small-real"}


def compare(options: argparse.Namespace, folder: Path) -> str:
    """Both checkouts, and TRL, by turns: medians over all steps of all rounds, and their ratios."""
    sides = {"this build": ROOT} | ({"the other": options.against.resolve()} if options.against else {})
    runs: dict[str, list[dict]] = {f"{variant}, {side}": [] for variant in COMPARED for side in sides}
    trl: list[dict] = []
    task, prompts, trl_options = task_of(options, folder)
    for number in range(options.rounds):
        for variant, overrides in COMPARED.items():
            for side, checkout in sides.items():
                say(f"round {number + 1}/{options.rounds}: {variant}, {side}")
                place = folder / f"{number}-{variant}-{side.replace(' ', '-')}"
                runs[f"{variant}, {side}"] += run(
                    [*overrides, *task, *options.overrides], options.steps, place, checkout
                )
        if options.trl:
            say(f"round {number + 1}/{options.rounds}: TRL")
            trl.append(trl_step.run_trl(options.steps, prompts, venv=options.venv or folder / "trl", **trl_options))
    lines = [parts_table(runs)]
    for variant in COMPARED:
        this_s = median(runs[f"{variant}, this build"], "timing_s/step")
        if options.against:
            lines.append(
                f"{variant}: {this_s / median(runs[f'{variant}, the other'], 'timing_s/step'):.2f} of the other"
            )
        if trl:
            trl_s = statistics.median(seconds for result in trl for seconds in result["seconds"][1:])
            lines.append(f"{variant}: {this_s / trl_s:.2f} of TRL's {trl_s:.2f} s")
    for result in trl:
        stated = result["median_seconds_of_parts"] | {"completion tokens": result["mean_completion_tokens"]}
        stated |= result["settings"] | result["versions"]
        lines.append("TRL: " + ", ".join(f"{name} {value}" for name, value in stated.items()))
    return "\n\n".join(lines)


def say(text: str) -> None:
    print(f"step: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", action="store_true", help="the rows of table.yaml")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout to compare with")
    parser.add_argument("--trl", action="store_true", help="TRL's GRPOTrainer, in an environment of its own")
    parser.add_argument(
        "--real", type=Path, nargs=2, metavar=("MODEL_DIR", "DATA_DIR"), help="instead of the embedded task"
    )
    parser.add_argument("--venv", type=Path, help="keep TRL's environment here; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each that is compared, by turns; default 2")
    parser.add_argument("overrides", nargs="*", help="passed on to iapo.train")
    options = parser.parse_args(arguments)
    if options.against and not (options.against / "iapo/train.py").is_file():
        parser.error(f"--against: {options.against} holds no iapo/train.py; give a checkout of this repository")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        with contextlib.redirect_stdout(sys.stderr):
            prepare("verbose_arithmetic", folder / "data")
        if options.against or options.trl or options.real:
            result = compare(options, folder)
        else:
            variants = rows_of_table() if options.rows else VARIANTS
            runs = {}
            for number, (variant, overrides) in enumerate(variants.items()):
                say(f"{number + 1}/{len(variants)}: {variant}")
                runs[variant] = run([*overrides, *options.overrides], options.steps, folder / f"run{number}")
            result = parts_table(runs)
    print(machine("cpu"))
    print(result)


if __name__ == "__main__":
    main()
