"""The embedded tasks: generated here, and each with a tiny model in iapo/assets that needs no download."""

import random
from typing import Any, Protocol

from iapo.tasks import checked_registers, verbose_arithmetic, worked_sums

Problem = tuple[Any, ...]  # of values that compare and hash


class Task(Protocol):
    """What a module of an embedded task has.

    Attributes:
        WORDS: the texts of its completions that are one token each, markers left out.
        CHARACTERS: those that are one token each by themselves.
        SCHEDULE: optimiser steps that the learning rate of its model's training takes to fall to 0.
        STEPS: after how many of these the training stops, so that the model still makes mistakes.
    """

    WORDS: tuple[str, ...]
    CHARACTERS: str
    SCHEDULE: int
    STEPS: int

    def sample_problem(self, rng: random.Random) -> Problem: ...

    def prompt(self, problem: Problem, /) -> str: ...

    def parse_prompt(self, text: str) -> Problem:
        """The problem of a prompt; a ValueError if it is none of this task."""

    def answer(self, problem: Problem, /) -> str: ...

    def trace(self, problem: Problem, rng: random.Random, /) -> str:
        """A completion with the right answer, as the model learns them; without EOS."""

    def lesson(self, rng: random.Random, step: int, /) -> tuple[Problem, list[tuple[str, bool]]]:
        """What a step of training learns from: a problem and such a completion, in pieces of whole tokens.

        A piece is a text and whether there is a loss on it.
        """

    def minimal_tokens(self, problem: Problem, /) -> int:
        """The fewest tokens of a completion with the right answer, EOS included."""

    def extract_answer(self, completion: str) -> str | None:
        """The answer of a completion; None if it has another form than the traces."""


TASKS: dict[str, Task] = {
    "verbose_arithmetic": verbose_arithmetic,
    "worked_sums": worked_sums,
    "checked_registers": checked_registers,
}
# The task of each folder in iapo/assets.
TASK_OF = {"tiny": "verbose_arithmetic", "tiny-worked": "worked_sums", "tiny-registers": "checked_registers"}
