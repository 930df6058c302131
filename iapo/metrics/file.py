"""A JSONL metrics file that a resumed run continues: one line {"step": N, "data": {...}} per logged step."""

import json
import os
from pathlib import Path


class MetricsFile:
    """Backend of verl's `Tracking` (methods `log` and `finish`).

    A run that resumes from step N repeats the later steps, so their lines move to `<name>.replaced.jsonl` in the same
    folder. Every step is once in the file, and nothing is lost. A run that starts from the beginning moves all lines
    of an earlier run there. The file is replaced atomically.

    Args:
        path: the file; its folder is made.
        resume_step: last step of the checkpoint that the run resumes from; 0 for a run from the beginning.
    """

    def __init__(self, path: Path, resume_step: int):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _drop_replaced_lines(path, resume_step) if path.exists() else []
        self._file = path.open("a")
        self._skip_step = resume_step if resume_step in kept else None

    def log(self, data: dict, step: int) -> None:
        if step == self._skip_step:
            return  # verl validates once more before it resumes; the step's line is there already
        self._file.write(json.dumps({"step": step, "data": {k: _number(v) for k, v in data.items()}}) + "\n")
        self._file.flush()

    def finish(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[tuple[int, dict]]:
    """(step, metrics) of every complete line, in order."""
    return [(record["step"], record["data"]) for record, _ in _records(Path(path))]


def _records(path: Path):
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # a killed process may leave half a line
            yield json.loads(line), line


def _drop_replaced_lines(path: Path, resume_step: int) -> list[int]:
    """The steps that stay in the file."""
    steps, kept, replaced = [], [], []
    for record, line in _records(path):
        if resume_step > 0 and record["step"] <= resume_step:
            steps.append(record["step"])
            kept.append(line)
        else:
            replaced.append(line)
    if replaced:
        with path.with_suffix(".replaced.jsonl").open("a") as file:
            file.writelines(replaced)
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(kept))
    os.replace(partial, path)
    return steps


def _number(value):
    """Plain JSON values from the numpy and torch scalars that verl logs."""
    return value.item() if hasattr(value, "item") else value
