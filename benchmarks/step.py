"""The time of a training step on the embedded task, and the share of the exit-entropy pass: python -m benchmarks.step

--rows takes the rows of table.yaml instead, each at the first of its values, and grpo last once more: the two tell how
far the machine drifted.

Trains a few steps of each variant on the real stack, one after the other, and prints the medians of verl's own timers
without the first step, which warms up. Later steps of the same run differ, so runs are compared by their shares.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import machine, table
from benchmarks.plan import load_methods
from iapo.metrics.file import read_metrics

VARIANTS = {
    "grpo": ["variant=grpo"],
    "iapo, every position": ["variant=iapo", "iapo.share_log_prob_forward=false"],
    "iapo, every position, shared": ["variant=iapo", "iapo.share_log_prob_forward=true"],
    "iapo, boundaries": ["variant=iapo", "iapo.probe_at=boundaries", "iapo.share_log_prob_forward=false"],
    "iapo, boundaries, shared": ["variant=iapo", "iapo.probe_at=boundaries", "iapo.share_log_prob_forward=true"],
}


def rows_of_table() -> dict[str, list[str]]:
    methods = load_methods(Path(__file__).parent / "table.yaml")
    rows = {name: [f"variant={m.variant}", *m.overrides(m.values[0])] for name, m in methods.items() if m.quick}
    return rows | {"grpo, again": rows["grpo"]}


def run(overrides: list[str], steps: int, folder: Path) -> list[dict]:
    """Metrics of steps 2, 3, ..."""
    command = [sys.executable, "-m", "iapo.train", *overrides, f"run_dir={folder}"]
    command += [f"trainer.total_training_steps={steps}", "trainer.test_freq=-1", "trainer.save_freq=-1"]
    command += ["trainer.val_before_train=false"]
    with folder.with_suffix(".log").open("w") as log:
        result = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if result.returncode:
        lines = folder.with_suffix(".log").read_text().splitlines()
        raise SystemExit("\n".join(lines[-20:]))
    return [metrics for step, metrics in read_metrics(folder / "metrics.jsonl") if step > 1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", action="store_true", help="the rows of table.yaml")
    parser.add_argument("overrides", nargs="*", help="passed on to iapo.train")
    options = parser.parse_args(arguments)
    rows, variants, first_s = [], rows_of_table() if options.rows else VARIANTS, None
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, overrides) in enumerate(variants.items()):
            print(f"{number + 1}/{len(variants)}: {name}", file=sys.stderr, flush=True)
            steps = run([*overrides, *options.overrides], options.steps, Path(folder) / f"run{number}")

            def median(key, steps=steps):
                return statistics.median(metrics.get(key, 0.0) for metrics in steps)

            first_s = first_s or median("timing_s/step")
            share = statistics.median(m.get("timing_s/exit_entropy", 0.0) / m["timing_s/step"] for m in steps)
            rows.append(
                [
                    name,
                    *(f"{median(f'timing_s/{key}'):.2f}" for key in ("step", "gen", "old_log_prob", "ref")),
                    *(f"{median(f'timing_s/{key}'):.2f}" for key in ("update_actor", "exit_entropy")),
                    f"{median('timing_s/step') / first_s:.2f}",
                    f"{100 * share:.1f}%",
                    f"{median('iapo/probe_tokens_per_second'):,.0f}",
                ]
            )
    header = [
        "seconds of a step",
        "step",
        "gen",
        "old_log_prob",
        "ref",
        "update",
        "exit_entropy",
        f"/ {next(iter(variants))}",
        "share",
        "probe tok/s",
    ]
    print(machine("cpu"))
    print(table(header, rows))


if __name__ == "__main__":
    main()
