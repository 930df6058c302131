"""Which tokens of a response are reasoning: those before the first exit marker that the completion itself wrote."""

from collections.abc import Callable, Sequence


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
