"""What the embedded tasks that add numbers share: the prompt, the answer, the shortest completion, filler.

A prompt is a sum, and a completion adds one number per step:

    12+34+5=
    <think>12+34=46;46+5=51;</think>
    <answer>51</answer>

Lengths are in tokens of the vocabularies of `iapo.tasks.tiny_model`: a marker, a filler word and every other character
are one token each, and EOS counts.

Every function is pure; randomness comes only from the `random.Random` that the caller passes.
"""

import random
import re
from itertools import accumulate

from iapo.answer_format import MARKERS, written

FILLER_WORDS = (" hmm", " well", " okay", " so", " now", " then", " let", " me", " see")
FEWEST_WORDS, MOST_WORDS = 4, 10  # of one filler

_COMPLETION = re.compile(written(".*", r"(\d+)"), re.DOTALL)  # the markers have no special characters


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


def minimal_trace(numbers: tuple[int, ...]) -> str:
    """The shortest completion of this form: every addition once and nothing else."""
    return written("".join(additions(numbers)), answer(numbers))


def minimal_tokens(numbers: tuple[int, ...]) -> int:
    """Tokens of `minimal_trace` and EOS: steps and answer by character, 4 markers, newline, EOS."""
    return sum(map(len, additions(numbers))) + len(answer(numbers)) + len(MARKERS) + 2


def extract_answer(completion: str) -> str | None:
    """The answer of a completion that has exactly the form above, whatever its reasoning says, else None."""
    match = _COMPLETION.fullmatch(completion)
    if match is None or any(completion.count(marker) != 1 for marker in MARKERS):
        return None
    return match.group(1)


def filler(rng: random.Random) -> str:
    """Words that say nothing about the answer, such as ` hmm let me see;`."""
    return "".join(rng.choices(FILLER_WORDS, k=rng.randint(FEWEST_WORDS, MOST_WORDS))) + ";"
