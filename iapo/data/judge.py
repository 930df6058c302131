"""Which reference answers the verifier can read.

A completion of a row with another reference is right only if it repeats this reference letter by letter.
"""

import asyncio
from collections.abc import Iterable, Sequence

from iapo.data.split import Example
from iapo.tasks.quantity import plain_number
from iapo.tasks.reference import references

OTHER = "7919"  # equal texts are right without being read, so each reference is compared with this one
TIMEOUT_S = 5.0  # of CPU time, as in training
BATCH = 50


def unreadable(examples: list[Example]) -> list[Example]:
    """The examples of whose reference answers the verifier can read none.

    Raises:
        ImportError: an answer is no plain number, and pebble or math-verify is not installed.
    """
    hard = sorted({text for example in examples for text in example.answers if plain_number(text) is None})
    failed = set(hard).difference(_readable(hard))
    return [example for example in examples if failed.issuperset(example.answers)]


def any_readable(ground_truths: Iterable[object]) -> bool:
    """Whether the verifier can read one reference answer of a column; stops at the first, and ends the verifier.

    Raises:
        ValueError: a ground truth that can't be judged, see `iapo.tasks.reference`.
        ImportError: as `unreadable`.
    """
    texts = [text for ground_truth in ground_truths for text in references(ground_truth)]
    if any(plain_number(text) is not None for text in texts):
        return True
    from iapo.tasks.verifier import close_pool

    try:
        return any(_readable(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH))
    finally:
        close_pool()


def _readable(texts: Sequence[str]) -> list[str]:
    """Those of these references that the verifier can read."""
    if not texts:
        return []
    from iapo.tasks.verifier import verdict  # needs packages that plain numbers don't

    async def verdicts() -> list[str]:
        return await asyncio.gather(*(verdict(OTHER, text, TIMEOUT_S) for text in texts))

    return [text for text, found in zip(texts, asyncio.run(verdicts()), strict=True) if found in ("right", "wrong")]
