"""Verbose arithmetic: the embedded task, on which the shortest possible reasoning is known exactly.

A prompt is the sum of four numbers from 1 to 99:

    12+34+5+78=

A completion reasons with one addition per step. After a step, with probability `redundancy`, it adds text that
carries no information about the answer: filler words, or the same addition once more:

    <think>12+34=46; hmm let me see;46+5=51; wait again:46+5=51;51+78=129;</think>
    <answer>129</answer>

Repeats are about ten tokens long, so traces average 1.4 times the minimum. `iapo.tasks.sums` has the rest of the form.

Every function is pure; randomness comes only from the `random.Random` that the caller passes.
"""

import random

from iapo.answer_format import written
from iapo.tasks.sums import (
    FILLER_WORDS,
    additions,
    answer,
    extract_answer,
    filler,
    minimal_tokens,
    minimal_trace,
    parse_prompt,
    prompt,
)

__all__ = [
    "CHARACTERS",
    "FILLER_WORDS",
    "REPEAT_WORDS",
    "SCHEDULE",
    "STEPS",
    "WORDS",
    "additions",
    "answer",
    "extract_answer",
    "lesson",
    "minimal_tokens",
    "minimal_trace",
    "parse_prompt",
    "prompt",
    "sample_problem",
    "trace",
]

TERMS = 4
LARGEST = 99

REPEAT_WORDS = (" wait", " again:")
WORDS: tuple[str, ...] = REPEAT_WORDS + FILLER_WORDS
CHARACTERS = "0123456789+=;\n"

SCHEDULE = 1500
STEPS = 1120  # at the end of the schedule the model makes too few mistakes to show a gain


def sample_problem(rng: random.Random) -> tuple[int, ...]:
    """Four numbers, each uniform on 1..99."""
    return tuple(rng.randint(1, LARGEST) for _ in range(TERMS))


def trace(numbers: tuple[int, ...], rng: random.Random, redundancy: float = 0.5) -> str:
    """A completion, without EOS; redundant text follows each addition with probability `redundancy`."""
    reasoning = ""
    for addition in additions(numbers):
        reasoning += addition
        if rng.random() < redundancy:
            reasoning += _redundant_text(addition, rng)
    return written(reasoning, answer(numbers))


def lesson(rng: random.Random, step: int) -> tuple[tuple[int, ...], list[tuple[str, bool]]]:
    """A problem and its trace in one piece, with a loss on all of it; the same at every step of training."""
    numbers = sample_problem(rng)
    return numbers, [(trace(numbers, rng), True)]


def _redundant_text(addition: str, rng: random.Random) -> str:
    return "".join(REPEAT_WORDS) + addition if rng.random() < 0.5 else filler(rng)
