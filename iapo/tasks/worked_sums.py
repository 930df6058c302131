"""Worked sums: the embedded task on which some tokens buy accuracy and others nothing.

A prompt is the sum of three numbers from 100 to 999:

    387+456+219=

A completion makes two additions. Each is written directly, or worked by columns with probability `worked`. After each,
with probability `filler`, words follow that carry no information about the answer:

    <think>387+456:3c4c8=843; hmm let me see;843+219=1062;</think>
    <answer>1062</answer>

The columns are the digits of the result from the units on, each with a `c` after it if it carries. One would expect
that they pay for their tokens where many carry and not where none does, and `kept_metrics` tells these apart. The
shipped model needs them everywhere (iapo/assets/tiny-worked/README.md). The filler never pays. `iapo.tasks.sums` has
the rest of the form.

Every function is pure; randomness comes only from the `random.Random` that the caller passes.
"""

import random
import re
from collections.abc import Iterable
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

from iapo.answer_format import written
from iapo.tasks import sums
from iapo.tasks.sums import (
    FILLER_WORDS,
    answer,
    extract_answer,
    minimal_tokens,
    minimal_trace,
    parse_prompt,
    prompt,
)

__all__ = [
    "CHARACTERS",
    "SCHEDULE",
    "STEPS",
    "WORDS",
    "Kept",
    "Sum",
    "answer",
    "carries",
    "columns",
    "extract_answer",
    "kept",
    "kept_metrics",
    "kind_of",
    "lesson",
    "minimal_tokens",
    "minimal_trace",
    "parse_prompt",
    "prompt",
    "sample_problem",
    "trace",
]

TERMS = 3
SMALLEST, LARGEST = 100, 999

WORDS: tuple[str, ...] = FILLER_WORDS
CHARACTERS = "0123456789+=;\n:c"

SCHEDULE, STEPS = 3000, 1700

# What the columns of an addition are, by how many of them carry: needed from two on, unneeded where none does.
KINDS = ("unneeded", "between", "needed", "needed")

_ADDITION = re.compile(r"(\d+)\+(\d+)(:[\dc]+)?=(\d+);")


class Sum(NamedTuple):
    """An addition as a completion wrote it.

    Attributes:
        carries: how many columns of the addition that was due carry.
        worked: it has columns, right or wrong.
        right: its result is that of the addition that was due.
    """

    carries: int
    worked: bool
    right: bool


class Kept(NamedTuple):
    """What a completion writes besides the answer.

    Attributes:
        sums: its additions in order, at most as many as are due.
        filler: how many filler words it has.
    """

    sums: tuple[Sum, ...]
    filler: int


def sample_problem(rng: random.Random) -> tuple[int, ...]:
    """Three numbers, each uniform on 100..999."""
    return tuple(rng.randint(SMALLEST, LARGEST) for _ in range(TERMS))


def columns(a: int, b: int) -> str:
    """The work of a + b, from the units on: `columns(387, 456)` is "3c4c8", `columns(843, 219)` is "2c60c1"."""
    work, carry = "", 0
    while a or b:
        carry, digit = divmod(a % 10 + b % 10 + carry, 10)
        work += f"{digit}{'c' * carry}"
        a, b = a // 10, b // 10
    return work + "1" * carry


def carries(a: int, b: int) -> int:
    """How many columns of a + b carry: 2 of 387+456, none of 120+235."""
    return columns(a, b).count("c")


def trace(numbers: tuple[int, ...], rng: random.Random, worked: float = 0.5, filler: float = 0.4) -> str:
    """A completion, without EOS.

    Args:
        numbers: the problem.
        worked: the probability that an addition is worked by columns.
        filler: the probability that filler follows an addition.
    """
    reasoning = ""
    for a, b in zip(accumulate(numbers), numbers[1:], strict=False):
        work = f":{columns(a, b)}" if rng.random() < worked else ""
        reasoning += f"{a}+{b}{work}={a + b};"
        if rng.random() < filler:
            reasoning += sums.filler(rng)
    return written(reasoning, answer(numbers))


def lesson(rng: random.Random, step: int) -> tuple[tuple[int, ...], list[tuple[str, bool]]]:
    """A problem and its trace in one piece, with a loss on all of it; the same at every step of training."""
    numbers = sample_problem(rng)
    return numbers, [(trace(numbers, rng), True)]


def kept(numbers: tuple[int, ...], completion: str) -> Kept:
    """What of a completion is work, where, and how many words are filler.

    The addition that is due adds the next number of the prompt to the result before, right or wrong, so a mistake
    counts once. A miscopied operand makes the result wrong. Additions after the last one that is due are ignored.

    A completion of any form is taken; where nothing looks like an addition there are no sums.
    """
    found, before = [], numbers[0]
    for due, (_, _, work, result) in zip(numbers[1:], _ADDITION.findall(completion), strict=False):
        found.append(Sum(carries(before, due), bool(work), int(result) == before + due))
        before = int(result)
    return Kept(tuple(found), sum(map(completion.count, FILLER_WORDS)))


def kept_metrics(completions: Iterable[Kept]) -> dict[str, float]:
    """Shares over the additions of all completions, and means per completion.

        worked/KIND        share of the additions of a kind that are worked by columns
        right/FORM/KIND    share of the additions of a kind that are right, of those worked or written directly
        filler             filler words per completion
        sums               additions per completion, at most two

    KIND is needed (two carries or more), between (one) or unneeded (none). A share of no addition is left out; without
    completions there is nothing.
    """
    completions = list(completions)
    if not completions:
        return {}
    written_sums = [step for completion in completions for step in completion.sums]
    metrics = {
        "filler": fmean(completion.filler for completion in completions),
        "sums": len(written_sums) / len(completions),
    }
    for kind in dict.fromkeys(KINDS):
        of_kind = [step for step in written_sums if kind_of(step) == kind]
        if of_kind:
            metrics[f"worked/{kind}"] = fmean(step.worked for step in of_kind)
        for form, worked in (("worked", True), ("direct", False)):
            right = [step.right for step in of_kind if step.worked is worked]
            if right:
                metrics[f"right/{form}/{kind}"] = fmean(right)
    return metrics


def kind_of(step: Sum) -> str:
    """Whether an addition needs its columns, one of `KINDS`."""
    return KINDS[min(step.carries, len(KINDS) - 1)]
