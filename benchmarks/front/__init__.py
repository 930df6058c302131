"""The best that a policy can do on an embedded task: E[accuracy] against E[tokens]. Pure functions.

`python -m benchmarks.front TASK MODEL_OR_RUN ...` compares models and runs with it; `--help` says more.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """A policy, or one way of answering a problem: (mean) tokens with EOS, (mean) probability of the right answer."""

    tokens: float
    accuracy: float


def hull(points: Iterable[Point]) -> list[Point]:
    """The points that are best at some price per token, by growing tokens: the upper concave hull up to its top."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.tokens, -point.accuracy)):
        if best and point.accuracy <= best[-1].accuracy:
            continue
        while len(best) > 1 and _slope(best[-2], best[-1]) <= _slope(best[-2], point):
            best.pop()
        best.append(point)
    return best


def _slope(a: Point, b: Point) -> float:
    return (b.accuracy - a.accuracy) / (b.tokens - a.tokens)


def front(problems: Sequence[Sequence[Point]]) -> list[Point]:
    """E[accuracy] against E[tokens] of the policy that chooses the best way of each problem, for every price.

    Where each token costs lambda, the policy that maximises E[accuracy] - lambda E[tokens] chooses on each problem's
    own hull. As lambda falls it takes the steps of all hulls in the order of their slope. Between two points a policy
    mixes the two.

    Args:
        problems: the ways of answering each, at least one.
    """
    hulls = [hull(points) for points in problems]
    steps = [step for points in hulls for step in pairwise(points)]
    tokens, accuracy = (sum(figures) for figures in zip(*(points[0] for points in hulls), strict=True))
    totals = [Point(tokens, accuracy)]
    for a, b in sorted(steps, key=lambda step: -_slope(*step)):
        tokens, accuracy = totals[-1]
        totals.append(Point(tokens + b.tokens - a.tokens, accuracy + b.accuracy - a.accuracy))
    return [Point(tokens / len(hulls), accuracy / len(hulls)) for tokens, accuracy in totals]


def at_price(best: Sequence[Point], price: float) -> Point:
    """The front's point that is best where a token costs `price` of a right answer."""
    return max(best, key=lambda point: point.accuracy - price * point.tokens)


def regret(best: Sequence[Point], policy: Point) -> float:
    """How far a policy's accuracy is below the front at as many tokens.

    Beyond the front's last point more tokens buy nothing. NaN with fewer tokens than the first, where a policy leaves
    something out.
    """
    if policy.tokens < best[0].tokens:
        return math.nan
    tokens, accuracies = zip(*best, strict=True)
    return float(np.interp(policy.tokens, tokens, accuracies)) - policy.accuracy
