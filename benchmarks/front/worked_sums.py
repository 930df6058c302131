"""The front of worked sums: no filler, and each addition written directly or worked by columns."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from benchmarks.front import Point
from iapo.tasks import worked_sums as task
from iapo.tasks.worked_sums import Kept

CARRIES = range(4)  # three columns of a three-digit number can carry
COLUMNS = ("filler words", "needed worked", "between", "unneeded")
EVERY_FORM = tuple((carries, worked) for carries in CARRIES for worked in (False, True))
RATES = tuple(f"{carries} carries" for carries in CARRIES)

Rates = Mapping[tuple[int, bool], float]


def right_rates(completions: Iterable[Kept]) -> dict[tuple[int, bool], float]:
    """The share of right additions by (carries, worked); pairs that never occur are left out."""
    sums = [step for completion in completions for step in completion.sums]
    total = Counter((step.carries, step.worked) for step in sums)
    right = Counter((step.carries, step.worked) for step in sums if step.right)
    return {key: right[key] / count for key, count in sorted(total.items())}


def ways(numbers: tuple[int, ...], rates: Rates) -> list[Point]:
    """What it takes to answer a problem without filler, each addition written directly or worked.

    The answer is right if all additions are, and their mistakes are taken to be independent.

    Raises:
        ValueError: an addition's (carries, worked) has no rate.
    """
    points = [Point(task.minimal_tokens(numbers), 1.0)]
    for a, b in zip(accumulate(numbers), numbers[1:], strict=False):
        carries = task.carries(a, b)
        for worked in (False, True):
            if (carries, worked) not in rates:
                form = "worked" if worked else "written directly"
                raise ValueError(f"rates: no addition with {carries} carries is {form}; sample more completions.")
        work = len(f":{task.columns(a, b)}")
        points = [
            Point(tokens + work * worked, accuracy * rates[carries, worked])
            for tokens, accuracy in points
            for worked in (False, True)
        ]
    return points


def columns(completions: Sequence[Kept]) -> list[float]:
    metrics = task.kept_metrics(completions)
    return [metrics["filler"], *(metrics.get(f"worked/{kind}", math.nan) for kind in ("needed", "between", "unneeded"))]


def rate_rows(rates: Rates) -> dict[str, list[float]]:
    return {
        form: [rates.get((carries, worked), math.nan) for carries in CARRIES]
        for form, worked in (("direct", False), ("worked", True))
    }
