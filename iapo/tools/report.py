"""Before and after: iapo report RUN_DIR [RUN_DIR ...] [--picture FILE]

Reads the metrics.jsonl of runs and prints held-out accuracy, mean response tokens and information rate at the first
and last validation; --picture draws accuracy against tokens over the course of each run.
"""

import argparse
import sys
from pathlib import Path

from iapo.arguments import Parser
from iapo.metrics.validation import Validation, validations


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
    """The change in percent; as a difference where one of the two isn't positive, so that percent mean nothing."""
    return f"{100 * (after / before - 1):+.1f}%" if before > 0 and after > 0 else f"{after - before:+.4f}"


def print_table(run_dir: Path) -> None:
    found = validations(run_dir)
    if len(found) > 1:
        print("\n" + table(found[0], found[-1]))
    written = ("metrics.jsonl", "config.yaml", "checkpoints", "validation", "tensorboard")
    print(f"\nfiles of the run: {run_dir}  ({', '.join(name for name in written if (run_dir / name).exists())})")


def at_least_two(run_dir: Path) -> list[Validation]:
    """The validations of a run, to compare.

    Raises:
        ValueError: there are fewer than two, or the folder is none of a run.
    """
    if run_dir.is_file():
        raise ValueError(f"{run_dir}: is a file; give the folder of a run.")
    try:
        found = validations(run_dir)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{run_dir}: holds no metrics.jsonl; give the folder of a run.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run_dir}/metrics.jsonl: not the metrics of a run ({error!r}); give another run.") from None
    if len(found) < 2:
        raise ValueError(f"{run_dir}: has {len(found)} validation(s), two are needed; train on, then report again.")
    return found


def draw(runs: dict[str, list[Validation]], path: Path) -> None:
    """Accuracy against mean response tokens, one line per run from its first validation (circle) to its last (dot).

    Raises:
        ValueError: the file can't be written, or matplotlib doesn't know its suffix.
    """
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
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ValueError(f"--picture: {path} can't be written ({error}); choose another, such as run.png.") from None
    finally:
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 printed, 2 nothing to report, with the reason in one line."""
    parser = Parser(prog="iapo report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        runs = {run_dir.name: at_least_two(run_dir) for run_dir in options.run_dirs}
        for name, found in runs.items():
            print(f"{name}\n{table(found[0], found[-1])}\n")
        if options.picture:
            draw(runs, options.picture)
    except ValueError as error:
        print(f"iapo.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
