"""What a response's text says about its tokens: where the reasoning ends, where its steps end, what it answers."""

from collections.abc import Callable, Sequence

import torch

# What a reasoning step ends with; after the last of them only white space may follow in the same token.
STEP_ENDS = (".", "!", "?", ";", "。", "！", "？", "；")


def reasoning_length(response_ids: Sequence[int], decode: Callable[[Sequence[int]], str], marker: str) -> int:
    """Tokens before the one in which the first `marker` begins; all of them if there is none (a truncated completion).

    The text is searched, not the token ids: a tokenizer may merge the marker's first character with the text before
    it. A token that holds both counts as part of the marker.

    Args:
        response_ids: the T token ids of one response.
        decode: token ids -> text; longer inputs must give longer or equal texts.
        marker: e.g. "</think>"; non-empty.
    """
    if marker not in decode(response_ids):
        return len(response_ids)
    # Smallest n such that the first n tokens contain the marker: it is complete with token n - 1.
    low, high = 1, len(response_ids)
    while low < high:
        middle = (low + high) // 2
        if marker in decode(response_ids[:middle]):
            high = middle
        else:
            low = middle + 1
    start = decode(response_ids[:low]).index(marker)
    length = low - 1
    while length > 0 and len(decode(response_ids[:length])) > start:
        length -= 1
    return length


def step_ends(decode: Callable[[Sequence[int]], str], vocabulary: int) -> torch.Tensor:
    """(V,) 1 for tokens that end a reasoning step: with a new line in them, or ending in one of `STEP_ENDS`.

    A point inside a number counts too: a probe more, not a wrong one.
    """
    texts = (decode([token]) for token in range(vocabulary))
    return torch.tensor(["\n" in text or text.rstrip().endswith(STEP_ENDS) for text in texts])


def final_answer(text: str, probe: str, end: str) -> str:
    """What the completion wrote between its last `probe` and the next `end`; "" if it lacks either."""
    _, found, rest = text.rpartition(probe)
    answer, closed, _ = rest.partition(end)
    return answer if found and closed else ""
