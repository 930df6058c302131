"""Reference answers: which values of a data set's `ground_truth` can be judged, and what they mean."""

import math
from collections.abc import Iterable
from decimal import Decimal

MAX_ANSWER_CHARS = 1000


def references(ground_truth: object) -> list[str]:
    """The texts of a ground truth, any of which is right.

    A number or a text is one reference, a list several; tuples and numpy's arrays and numbers count as such. Floats are
    written out in full, without an exponent: 1e16 is "10000000000000000", 18.0 is "18".

    Raises:
        ValueError: there is none, or one that no answer can be compared with; it says which, in the words that complete
            "ground truth ".
    """
    if hasattr(ground_truth, "tolist"):  # numpy's arrays and numbers, without importing it
        shortest = str(ground_truth)  # float32 0.1 is "0.1", as a Python float it is 0.10000000149011612
        plain = ground_truth.tolist()
        ground_truth = float(shortest) if isinstance(plain, float) else plain
    if isinstance(ground_truth, list | tuple):
        if not ground_truth:
            raise ValueError("is an empty list")
        if any(isinstance(entry, list | tuple | dict) for entry in ground_truth):
            raise ValueError("is a list of lists or dicts")
        return [text for entry in ground_truth for text in references(entry)]
    if ground_truth is None:
        raise ValueError("is null")
    if isinstance(ground_truth, float | Decimal):
        if not math.isfinite(ground_truth):
            raise ValueError(f"is {ground_truth}, no finite number")
        written = f"{Decimal(repr(ground_truth) if isinstance(ground_truth, float) else ground_truth):f}"
        return [written.rstrip("0").rstrip(".") if "." in written else written]
    if isinstance(ground_truth, bool):
        raise ValueError(f"is {ground_truth}, no number or text")
    if not isinstance(ground_truth, str | int):
        raise ValueError(f"is a {type(ground_truth).__name__}")
    text = str(ground_truth).strip()
    if text.casefold() == "nan":  # what a missing number becomes as text
        raise ValueError(f"is {text!r}, no answer")
    if not text or len(text) > MAX_ANSWER_CHARS:
        raise ValueError(f"has {len(text)} characters, not 1 to {MAX_ANSWER_CHARS}")
    return [text]


def unjudgeable(ground_truths: Iterable[object]) -> str | None:
    """What is wrong with a column of ground truths, as "row 2 is null, and 3 more can't be judged"; None if nothing is.

    Rows count from 0. Without such a check every completion of these rows would be wrong.
    """
    first, others = None, 0
    for row, ground_truth in enumerate(ground_truths):
        try:
            references(ground_truth)
        except ValueError as error:
            others += first is not None
            first = first or f"row {row} {error}"
    return f"{first}, and {others} more can't be judged" if others else first
