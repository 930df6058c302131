"""Which reference answers the verifier can read.

A completion of a row with another reference is right only if it repeats this reference letter by letter.
"""

import asyncio
from collections.abc import Iterable, Sequence
from itertools import chain

from iapo.data.split import Example
from iapo.tasks.quantity import plain_number
from iapo.tasks.reference import references

OTHER = "7919"  # equal texts are right without being read, so each reference is compared with this one
TIMEOUT_S = 5.0  # of CPU time, as in training
MOST_JUDGED = 500  # before a run: it takes some seconds


def unreadable(examples: list[Example]) -> list[Example]:
    """The examples of whose reference answers the verifier can read none.

    Raises:
        ImportError: an answer is no plain number, and pebble or math-verify is not installed.
    """
    hard = sorted({text for example in examples for text in example.answers if plain_number(text) is None})
    failed = set(hard).difference(_readable(hard))
    return [example for example in examples if failed.issuperset(example.answers)]


def unreadable_rows(ground_truths: Iterable[object], most: int = MOST_JUDGED) -> list[int]:
    """The rows of a column of which the verifier can read no reference answer; ends the verifier.

    Args:
        most: so many distinct answers that are no plain numbers are tried, the first ones, and more while none can be
            read; the others count as readable.

    Raises:
        ValueError: a ground truth that can't be judged, see `iapo.tasks.reference`.
        ImportError: as `unreadable`.
    """
    texts = [references(ground_truth) for ground_truth in ground_truths]
    distinct = dict.fromkeys(chain.from_iterable(texts))
    hard = [text for text in distinct if plain_number(text) is None]
    if not hard:
        return []
    from iapo.tasks.verifier import close_pool

    failed: set[str] = set()
    try:
        for start in range(0, len(hard), most):
            tried = hard[start : start + most]
            failed.update(set(tried).difference(_readable(tried)))
            if len(failed) < start + len(tried) or len(hard) < len(distinct):
                break
    finally:
        close_pool()
    return [row for row, listed in enumerate(texts) if failed.issuperset(listed)]


def _readable(texts: Sequence[str]) -> list[str]:
    """Those of these references that the verifier can read."""
    if not texts:
        return []
    from iapo.tasks.verifier import verdict  # needs packages that plain numbers don't

    async def verdicts() -> list[str]:
        return await asyncio.gather(*(verdict(OTHER, text, TIMEOUT_S) for text in texts))

    return [text for text, found in zip(texts, asyncio.run(verdicts()), strict=True) if found in ("right", "wrong")]
