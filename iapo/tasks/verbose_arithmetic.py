"""Verbose arithmetic: the embedded task, on which the shortest possible reasoning is known exactly.

A prompt is the sum of four numbers from 1 to 99:

    12+34+5+78=

A completion reasons with one addition per step. After a step, with probability `redundancy`, it adds text that
carries no information about the answer: filler words, or the same addition once more:

    <think>12+34=46; hmm let me see;46+5=51; wait again:46+5=51;51+78=129;</think>
    <answer>129</answer>

A model that is fine-tuned on such traces is a small verbose reasoner. Lengths are in tokens of the vocabulary of
`iapo.tasks.tiny_model`: a marker, a filler word and every other character are one token each, and EOS counts.

Every function is pure; randomness comes only from the `random.Random` that the caller passes.
"""

import random
import re
from itertools import accumulate

from iapo.answer_format import MARKERS, written

TERMS = 4
LARGEST = 99

REPEAT_WORDS = (" wait", " again:")
FILLER_WORDS = (" hmm", " well", " okay", " so", " now", " then", " let", " me", " see")
CHARACTERS = "0123456789+=;\n"

# A filler is this many words. With repeats about ten tokens long, traces average 1.4 times the minimum.
FEWEST_WORDS, MOST_WORDS = 4, 10

_COMPLETION = re.compile(written(".*", r"(\d+)"), re.DOTALL)  # the markers have no special characters


def sample_problem(rng: random.Random) -> tuple[int, ...]:
    """Four numbers, each uniform on 1..99."""
    return tuple(rng.randint(1, LARGEST) for _ in range(TERMS))


def prompt(numbers: tuple[int, ...]) -> str:
    return "+".join(map(str, numbers)) + "="


def parse_prompt(text: str) -> tuple[int, ...]:
    """The numbers of a prompt.

    Raises:
        ValueError: `text` is not of the form `12+34+5+78=`.
    """
    if not re.fullmatch(r"\d+(\+\d+)+=", text):
        raise ValueError(f"prompt: {text!r} must be a sum such as '12+34+5+78='.")
    return tuple(map(int, text[:-1].split("+")))


def answer(numbers: tuple[int, ...]) -> str:
    return str(sum(numbers))


def additions(numbers: tuple[int, ...]) -> list[str]:
    """The necessary steps: `(12, 34, 5)` gives `["12+34=46;", "46+5=51;"]`."""
    sums = accumulate(numbers)
    return [f"{s}+{x}={s + x};" for s, x in zip(sums, numbers[1:], strict=False)]


def trace(numbers: tuple[int, ...], rng: random.Random, redundancy: float = 0.5) -> str:
    """A completion, without EOS; redundant text follows each addition with probability `redundancy`."""
    reasoning = ""
    for addition in additions(numbers):
        reasoning += addition
        if rng.random() < redundancy:
            reasoning += _redundant_text(addition, rng)
    return written(reasoning, answer(numbers))


def minimal_trace(numbers: tuple[int, ...]) -> str:
    """The shortest completion of this form: every addition once and nothing else."""
    return trace(numbers, random.Random(0), redundancy=0.0)


def minimal_tokens(numbers: tuple[int, ...]) -> int:
    """Tokens of `minimal_trace` and EOS: steps and answer by character, 4 markers, newline, EOS."""
    return sum(map(len, additions(numbers))) + len(answer(numbers)) + len(MARKERS) + 2


def extract_answer(completion: str) -> str | None:
    """The answer of a completion that has exactly the form above, else None."""
    match = _COMPLETION.fullmatch(completion)
    if match is None or any(completion.count(marker) != 1 for marker in MARKERS):
        return None
    return match.group(1)


def _redundant_text(addition: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return "".join(REPEAT_WORDS) + addition
    return "".join(rng.choices(FILLER_WORDS, k=rng.randint(FEWEST_WORDS, MOST_WORDS))) + ";"
