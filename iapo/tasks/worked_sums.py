"""Worked sums: the embedded task on which length buys accuracy where it is needed, and nothing elsewhere.

A prompt is the sum of three numbers from 100 to 999:

    387+456+219=

A completion makes two additions. Each is written directly, or worked by columns with probability `worked`. After each,
with probability `filler`, words follow that carry no information about the answer:

    <think>387+456:3c4c8=843; hmm let me see;843+219=1062;</think>
    <answer>1062</answer>

The columns are the digits of the result from the units on, each with a `c` after it if it carries. An addition with
many carries is where a model errs if it writes the result directly, so there the columns pay for their tokens. Where
nothing carries they don't. `iapo.tasks.sums` has the rest of the form.

Every function is pure; randomness comes only from the `random.Random` that the caller passes.
"""

import random
from itertools import accumulate

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
    "answer",
    "carries",
    "columns",
    "extract_answer",
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

SCHEDULE = STEPS = 1600


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
