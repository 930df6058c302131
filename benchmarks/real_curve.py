"""Runs on a real model, kept small and drawn: python -m benchmarks.real_curve record RUN_DIR ... | show [--picture PNG]

`record` writes benchmarks/real/RUN.json of each run: its arguments, what validations found and what each training step
was like, and some completions of the same prompts from the first and the last validation. `show` prints the table and
the completions of all records, as docs/results.md has them, and draws accuracy, format and length over the steps.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import table
from iapo.metrics.file import read_metrics
from iapo.metrics.validation import mean_of

FOLDER = Path(__file__).parent / "real"
TRACES = 10
VALIDATED = ("acc", "format", "response_length", "truncated", "information_rate")
SHOWN = {"acc": 3, "format": 3, "response_length": 1, "information_rate": 3}  # with so many digits
TRAINED = {
    "acc": "iapo/reward/acc",
    "format": "iapo/reward/format",
    "response_length": "iapo/reward/response_length",
    "score": "critic/score/mean",
    "information_rate": "iapo/information_rate",
    "rate_share": "iapo/advantage_share/information_rate",
    "seconds": "timing_s/step",
}
# Panels of the picture: name in the record, title.
PANELS = {"acc": "held-out accuracy", "format": "held-out format", "response_length": "held-out tokens"}


def record(run_dir: Path, traces: int = TRACES) -> dict:
    """What is kept of a run.

    Raises:
        FileNotFoundError: the folder is none of a run.
    """
    metrics = read_metrics(run_dir / "metrics.jsonl")
    validations = [(step, {name: mean_of(data, name) for name in VALIDATED}) for step, data in metrics]
    validations = [(step, found) for step, found in validations if found["acc"] is not None]
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    first, last = (completions(run_dir, step) for step in (validations[0][0], validations[-1][0]))
    return {
        "run": run_dir.name,
        "starts": [
            {"time": start["time"], "arguments": without_folders(start["arguments"]), "versions": start["versions"]}
            for start in starts
        ],
        "validations": [{"step": step, **rounded(found)} for step, found in validations],
        "steps": [
            {"step": step, **rounded({name: data.get(key) for name, key in TRAINED.items()})}
            for step, data in metrics
            if TRAINED["seconds"] in data
        ],
        "traces": [
            {
                "question": question(prompt),
                "reference": first[prompt]["gts"],
                "before": kept(first[prompt]),
                "after": kept(last[prompt]),
            }
            for prompt in sorted(first.keys() & last.keys())[:traces]
        ],
    }


def completions(run_dir: Path, step: int) -> dict[str, dict]:
    """By prompt, its first completion of a validation."""
    lines = (run_dir / "validation" / f"{step}.jsonl").read_text().splitlines()
    return {row["input"]: row for row in map(json.loads, reversed(lines))}


def without_folders(arguments: Sequence[str]) -> list[str]:
    """Of `key=/a/folder/name` only `key=name`: where files were says nothing."""
    return [re.sub(r"=/(?:[^/]+/)*", "=", argument) for argument in arguments]


def question(prompt: str) -> str:
    """The user's text without the instruction that `iapo data` adds."""
    return prompt.rpartition("\nuser\n")[2].partition("\n\n")[0]


def kept(row: dict) -> dict:
    return {"text": row["output"], "right": row["acc"] == 1, "tokens": int(row["response_length"])}


def rounded(numbers: dict[str, float | None]) -> dict[str, float]:
    return {name: round(number, 4) for name, number in numbers.items() if number is not None}


def summary(records: Sequence[dict]) -> str:
    """A row per run and validation."""
    rows = []
    for entry in records:
        for found in entry["validations"]:
            seconds = sum(step["seconds"] for step in entry["steps"] if step["step"] <= found["step"])
            numbers = [f"{found[name]:.{digits}f}" if name in found else "" for name, digits in SHOWN.items()]
            rows.append([entry["run"], str(found["step"]), *numbers, f"{seconds / 3600:.2f}"])
    return table(["run", "step", "accuracy", "format", "tokens", "nats / token", "hours"], rows)


def traces_table(entry: dict) -> str:
    """The completions of a record, before and after."""
    rows = [
        [one_line(trace["question"]), trace["reference"], shown(trace["before"]), shown(trace["after"])]
        for trace in entry["traces"]
    ]
    return table(["question", "answer", "before", "after"], rows)


def shown(side: dict) -> str:
    return f"{side['tokens']}{'' if side['right'] else ' wrong'}: `{one_line(side['text'])}`"


def one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("|", "/").replace("`", "'")


def draw(records: Sequence[dict], file: Path) -> None:
    """Accuracy, format and tokens of the validations over the steps; one colour per method, one dash per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(sorted({method(entry) for entry in records}), ("#0072b2", "#d55e00", "#009e73"), strict=False))
    dashes = dict(zip(sorted({seed(entry) for entry in records}), ("-", "--", ":"), strict=False))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 3.2), layout="constrained")
    for ax, (name, title) in zip(axes, PANELS.items(), strict=True):
        for entry in records:
            steps, values = zip(*((found["step"], found[name]) for found in entry["validations"]), strict=True)
            look = dict(color=colours[method(entry)], linestyle=dashes[seed(entry)])
            ax.plot(steps, values, marker="o", ms=3, label=entry["run"], **look)
        ax.set(title=title, xlabel="step")
        ax.set_ylim(0, 1.1 * ax.dataLim.ymax)  # from 0, or noise would look like a trend
        ax.title.set_size(10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def method(entry: dict) -> str:
    """`grpo` of the run `grpo-0`."""
    return entry["run"].rpartition("-")[0]


def seed(entry: dict) -> str:
    """`0` of the run `grpo-0`."""
    return entry["run"].rpartition("-")[2]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="named METHOD-SEED")
    showing = commands.add_parser("show")
    showing.add_argument("--picture", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "record":
        FOLDER.mkdir(exist_ok=True)
        for run_dir in options.runs:
            (FOLDER / f"{run_dir.name}.json").write_text(json.dumps(record(run_dir), indent=1) + "\n")
        return
    records = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    print(summary(records))
    for entry in records:
        print(f"\n{entry['run']}\n\n{traces_table(entry)}")
    if options.picture:
        draw(records, options.picture)


if __name__ == "__main__":
    main()
