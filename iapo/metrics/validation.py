"""The validations of a run, read from its metrics."""

import re
from pathlib import Path
from typing import NamedTuple

from iapo.metrics.file import read_metrics


class Validation(NamedTuple):
    """One validation: means over held-out prompts; every data source has the same weight."""

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
    accuracy, tokens = mean_of(data, "acc"), mean_of(data, "response_length")
    if accuracy is None or tokens is None:
        return None
    return Validation(step, accuracy, tokens, mean_of(data, "information_rate"))


def mean_of(data: dict, variable: str) -> float | None:
    """The mean over data sources of a number that the reward returns, such as "acc"; None if it isn't there.

    verl averages prompts that lost completions apart, under a smaller N. The largest N of a source counts.
    """
    largest: dict[str, tuple[int, float]] = {}
    for key, value in data.items():
        if match := re.fullmatch(rf"val-(?:core|aux)/(.+)/{variable}/mean@(\d+)", key):
            source, n = match[1], int(match[2])
            largest[source] = max(largest.get(source, (0, 0.0)), (n, value))
    return sum(value for _, value in largest.values()) / len(largest) if largest else None
