"""Before and after: iapo report RUN_DIR [RUN_DIR ...] [--picture FILE]

Reads the metrics.jsonl of runs and prints held-out accuracy, mean response tokens and information rate at the first
and last validation; --picture draws accuracy against tokens over the course of each run.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

from iapo.metrics.file import read_metrics


class Validation(NamedTuple):
    """One validation: means over the held-out prompts of every data source together with equal weight."""

    step: int
    accuracy: float
    tokens: float
    information_rate: float | None  # nats per token; None if it wasn't measured


def validations(run_dir: Path) -> list[Validation]:
    """Every validation of a run, in order.

    Raises:
        FileNotFoundError: the folder holds no metrics.jsonl.
    """
    found = [validation(step, data) for step, data in read_metrics(Path(run_dir) / "metrics.jsonl")]
    return [entry for entry in found if entry is not None]


def validation(step: int, data: dict) -> Validation | None:
    """The validation that a step's metrics hold; None if they hold none."""
    accuracy, tokens = _mean(data, "acc"), _mean(data, "response_length")
    if accuracy is None or tokens is None:
        return None
    return Validation(step, accuracy, tokens, _mean(data, "information_rate"))


def _mean(data: dict, variable: str) -> float | None:
    values = [v for k, v in data.items() if re.fullmatch(rf"val-(core|aux)/.+/{variable}/mean@\d+", k)]
    return sum(values) / len(values) if values else None


def table(first: Validation, last: Validation) -> str:
    rows = [
        ("", "before", "after", "change"),
        ("step", f"{first.step}", f"{last.step}", ""),
        (
            "held-out accuracy",
            f"{first.accuracy:.3f}",
            f"{last.accuracy:.3f}",
            f"{100 * (last.accuracy - first.accuracy):+.1f} points",
        ),
        ("mean response tokens", f"{first.tokens:.1f}", f"{last.tokens:.1f}", _percent(first.tokens, last.tokens)),
    ]
    if first.information_rate is not None and last.information_rate is not None:
        before, after = first.information_rate, last.information_rate
        rows.append(("information rate (nats/token)", f"{before:.4f}", f"{after:.4f}", _percent(before, after)))
    return "\n".join(f"{name:<31}{before:>9}{after:>9}{change:>15}".rstrip() for name, before, after, change in rows)


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f}%" if before else ""


def print_table(run_dir: Path) -> None:
    found = validations(run_dir)
    if len(found) > 1:
        print("\n" + table(found[0], found[-1]))
    print(f"\nfiles of the run: {run_dir}  (metrics.jsonl, config.yaml, checkpoints/, validation/, tensorboard/)")


def draw(runs: dict[str, list[Validation]], path: Path) -> None:
    """Accuracy against mean response tokens, one line per run from its first validation (circle) to its last (dot)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in runs.items():
        line = axes.plot([p.tokens for p in points], [100 * p.accuracy for p in points], lw=1.2, label=name)[0]
        axes.plot(points[0].tokens, 100 * points[0].accuracy, "o", mfc="white", color=line.get_color())
        axes.plot(points[-1].tokens, 100 * points[-1].accuracy, "o", color=line.get_color())
    axes.set_xlabel("mean response tokens (fewer is better)")
    axes.set_ylabel("held-out accuracy [%]")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="start: circle, end: dot")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 printed, 2 nothing to report, with the reason in one line."""
    parser = argparse.ArgumentParser(
        prog="iapo report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args(arguments)
    runs = {}
    for run_dir in options.run_dirs:
        try:
            found = validations(run_dir)
        except (FileNotFoundError, NotADirectoryError):
            print(f"iapo.report: {run_dir}: holds no metrics.jsonl; give the folder of a run.", file=sys.stderr)
            return 2
        except (ValueError, KeyError, TypeError) as error:
            print(f"iapo.report: {run_dir}/metrics.jsonl: not the metrics of a run ({error!r}).", file=sys.stderr)
            return 2
        if len(found) < 2:
            print(f"iapo.report: {run_dir}: has {len(found)} validation(s), two are needed.", file=sys.stderr)
            return 2
        runs[run_dir.name] = found
        print(f"{run_dir.name}\n{table(found[0], found[-1])}\n")
    if options.picture:
        try:
            draw(runs, options.picture)
        except (OSError, ValueError) as error:  # its folder, or a suffix that matplotlib doesn't know
            print(f"iapo.report: --picture: {options.picture} can't be written ({error}).", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
