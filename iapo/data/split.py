"""Examples, distinct and divided into train and test."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal

from iapo.tasks.quantity import plain_number

TEST_FRACTION = 0.2

# 300 of SVAMP's IDs, chal-1 to chal-1000, have a hash below it.
TEST_HASHES = 0.2747


@dataclass(frozen=True)
class Example:
    """A question and its reference answer.

    Attributes:
        question: without the instruction.
        answer: a text, or a list of texts, any of which is right.
        index: the row number in the source, from 0.
        id: the source's own name of the row, where the data set is divided by it.
    """

    question: str
    answer: str | list[str]
    index: int
    id: object = None

    @property
    def answers(self) -> list[str]:
        return [self.answer] if isinstance(self.answer, str) else self.answer


Divide = Callable[[list[Example], int], tuple[list[Example], list[Example]]]


def normalise(question: str) -> str:
    return " ".join(question.split()).casefold()


def contradict(one: Example, other: Example) -> bool:
    """Whether two examples have no answer in common; equal numbers are one answer, however they are written."""
    return _values(one).isdisjoint(_values(other))


def _values(example: Example) -> set[Decimal | str]:
    numbers = {text: plain_number(text) for text in example.answers}
    return {text.casefold() if number is None else number for text, number in numbers.items()}


Pair = tuple[Example, Example]  # one that is left out, and the one that is kept


def unique(examples: Iterable[Example], contradictions: list[Pair]) -> Iterator[Example]:
    """The first example of every question; later ones with another answer are added to `contradictions`."""
    kept: dict[str, Example] = {}
    for example in examples:
        first = kept.setdefault(normalise(example.question), example)
        if first is example:
            yield example
        elif contradict(example, first):
            contradictions.append((example, first))


def without(examples: list[Example], others: list[Example], contradictions: list[Pair]) -> Iterator[Example]:
    """The examples whose question is not among the others'; as `unique` does with those that are left out."""
    taken = {normalise(other.question): other for other in others}
    for example in examples:
        other = taken.get(normalise(example.question))
        if other is None:
            yield example
        elif contradict(example, other):
            contradictions.append((example, other))


def divide_randomly(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Train and test, in the source's order; the test split has TEST_FRACTION of the examples, rounded."""
    test = set(random.Random(seed).sample(range(len(examples)), round(TEST_FRACTION * len(examples))))
    return (
        [example for i, example in enumerate(examples) if i not in test],
        [example for i, example in enumerate(examples) if i in test],
    )


def divide_by_id(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Train and test by each example's id alone, whatever else is in the file; `seed` changes nothing.

    An example is in test where the first 32 bits of the SHA-256 of its id, divided by 2^32, are below TEST_HASHES.
    """
    low = [int(hashlib.sha256(str(e.id).encode()).hexdigest()[:8], 16) / 2**32 < TEST_HASHES for e in examples]
    return (
        [example for example, is_test in zip(examples, low, strict=True) if not is_test],
        [example for example, is_test in zip(examples, low, strict=True) if is_test],
    )
