"""What is kept of worked sums, and the best there is: python -m benchmarks.worked_sums MODEL_OR_RUN ...

MODEL is a folder of transformers' form, whose completions are sampled; RUN is a run's folder, whose last validation is
read. The first table says how many tokens, filler words and worked additions each has, where the columns are needed
and where they are not. The second says how often its additions are right, by carries and form.

The front is what a policy could reach that makes no more mistakes than the first MODEL or RUN, writes no filler, and
works an addition only where that pays. The last column of the first table is the regret: how far an accuracy lies
below the front at as many tokens. It is negative where training made the additions themselves more accurate.
"""

import argparse
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import table
from iapo.tasks import worked_sums as task
from iapo.tasks.tiny_model import complete
from iapo.tasks.worked_sums import Kept, Sum, kept
from iapo.tools.evaluate import last_dump, read_samples

CARRIES = range(4)  # three columns of a three-digit number can carry
SEED = 1_000_003  # that of tiny_model's evaluation


class Point(NamedTuple):
    """A policy, or one way of answering a problem: (mean) tokens with EOS, (mean) probability of the right answer."""

    tokens: float
    accuracy: float


Right = Mapping[tuple[int, bool], float]


def right_rates(sums: Iterable[Sum]) -> dict[tuple[int, bool], float]:
    """The share of right additions by (carries, worked); pairs that never occur are left out."""
    sums = list(sums)
    total = Counter((step.carries, step.worked) for step in sums)
    right = Counter((step.carries, step.worked) for step in sums if step.right)
    return {key: right[key] / count for key, count in sorted(total.items())}


def ways(numbers: tuple[int, ...], right: Right) -> list[Point]:
    """What it takes to answer a problem without filler, each addition written directly or worked.

    The answer is right if all additions are, and their mistakes are taken to be independent.

    Raises:
        ValueError: an addition's (carries, worked) has no rate.
    """
    points = [Point(task.minimal_tokens(numbers), 1.0)]
    for a, b in zip(accumulate(numbers), numbers[1:], strict=False):
        carries = task.carries(a, b)
        for worked in (False, True):
            if (carries, worked) not in right:
                form = "worked" if worked else "written directly"
                raise ValueError(f"right: no addition with {carries} carries is {form}; sample more completions.")
        work = len(f":{task.columns(a, b)}")
        points = [
            Point(tokens + work * worked, accuracy * right[carries, worked])
            for tokens, accuracy in points
            for worked in (False, True)
        ]
    return points


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


def regret(best: Sequence[Point], policy: Point) -> float:
    """How far a policy's accuracy is below the front at as many tokens.

    Beyond the front's last point more tokens buy nothing. NaN with fewer tokens than the first, where a policy leaves
    something out.
    """
    if policy.tokens < best[0].tokens:
        return math.nan
    tokens, accuracies = zip(*best, strict=True)
    return float(np.interp(policy.tokens, tokens, accuracies)) - policy.accuracy


# --- the command ---


class Written(NamedTuple):
    """The completions of a model or a run."""

    problems: list[tuple[int, ...]]
    policy: Point
    kept: list[Kept]

    @property
    def right(self) -> dict[tuple[int, bool], float]:
        return right_rates(step for completion in self.kept for step in completion.sums)


def sampled(model_dir: Path, prompts: int) -> Written:
    rng = random.Random(SEED)
    problems = [task.sample_problem(rng) for _ in range(prompts)]
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    completions = complete(model, tokenizer, problems, SEED, task)
    right = [task.extract_answer(c.text) == task.answer(p) for c, p in zip(completions, problems, strict=True)]
    policy = Point(fmean(completion.tokens for completion in completions), fmean(right))
    return Written(problems, policy, [kept(p, c.text) for p, c in zip(problems, completions, strict=True)])


def validated(run_dir: Path) -> Written:
    """The last validation of a run.

    Raises:
        ValueError: it has none, or one without the texts of worked sums.
    """
    dump = last_dump(run_dir)
    samples = read_samples(dump)
    texts = [json.loads(line).get("output") for line in dump.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    if not samples or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{dump}: holds no completions with a text 'output'; validate the run again.")
    problems = [task.parse_prompt(sample.prompt) for sample in samples]
    policy = Point(fmean(sample.tokens for sample in samples), fmean(sample.correct for sample in samples))
    return Written(problems, policy, [kept(p, text) for p, text in zip(problems, texts, strict=True)])


def at_price(best: Sequence[Point], price: float) -> Point:
    """The front's point that is best where a token costs `price` of a right answer."""
    return max(best, key=lambda point: point.accuracy - price * point.tokens)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="MODEL_OR_RUN")
    parser.add_argument("--prompts", type=int, default=1024, help="sampled of a model, default 1024")
    options = parser.parse_args(arguments)
    if options.prompts < 1:
        print("benchmarks.worked_sums: --prompts must be at least 1.", file=sys.stderr)
        return 2
    try:
        found = {
            path.name: sampled(path, options.prompts) if (path / "config.json").is_file() else validated(path)
            for path in options.paths
        }
        first = next(iter(found.values()))
        fronts = {name: front([ways(p, first.right) for p in row.problems]) for name, row in found.items()}
    except ValueError as error:
        print(f"benchmarks.worked_sums: {error}", file=sys.stderr)
        return 2
    print_tables(found, fronts)
    return 0


def print_tables(found: Mapping[str, Written], fronts: Mapping[str, list[Point]]) -> None:
    rows, rates = [], []
    for name, written in found.items():
        metrics = task.kept_metrics(written.kept)
        worked = [metrics.get(f"worked/{kind}", math.nan) for kind in ("needed", "between", "unneeded")]
        figures = [written.policy.tokens, metrics["filler"], *worked, regret(fronts[name], written.policy)]
        digits = (1, 2, 2, 2, 2, 3)
        cells = [f"{figure:.{places}f}" for figure, places in zip(figures, digits, strict=True)]
        rows.append([name, f"{written.policy.accuracy:.3f}", *cells])
        for form, is_worked in (("direct", False), ("worked", True)):
            right = [written.right.get((carries, is_worked), math.nan) for carries in CARRIES]
            rates.append([f"{name}, {form}", *(f"{rate:.3f}" for rate in right)])
    header = ["", "accuracy", "tokens", "filler words", "needed worked", "between", "unneeded", "regret"]
    print(table(header, rows) + "\n")
    print(table(["right", *(f"{carries} carries" for carries in CARRIES)], rates) + "\n")
    best = next(iter(fronts.values()))
    priced = {f"{price:g}": at_price(best, price) for price in (1, 0.01, 0.003, 0.001, 0)}
    print(
        table(
            ["price of a token", "accuracy", "tokens"],
            [[price, f"{point.accuracy:.3f}", f"{point.tokens:.1f}"] for price, point in priced.items()],
        )
    )


if __name__ == "__main__":
    sys.exit(main())
