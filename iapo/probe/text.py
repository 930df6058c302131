"""What a response's text says about its tokens: where the reasoning ends, where its steps end, what it answers."""

from collections.abc import Callable, Sequence

import torch

from iapo.answer_format import final_answer as final_answer  # what reads a response is in this module
from iapo.config import IapoConfig

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


def region_length(response: torch.Tensor, mask: torch.Tensor, config: IapoConfig, tokenizer, ends: set[int]) -> int:
    """Response tokens that are probed: `iapo.probe.text`, never the token that ends the completion."""
    length = int(mask.sum())
    if length and int(response[length - 1]) in ends:
        length -= 1
    if config.region == "response" or length == 0:
        return length
    return min(length, reasoning_length(response.tolist(), lambda ids: decode(tokenizer, ids), config.exit_marker))


def answer_ids(tokenizer, probe: str, answer: str) -> torch.Tensor:
    """The tokens of `answer` as they stand behind the probe; some tokenizers write a text's first word otherwise."""
    before, both = (tokenizer.encode(text, add_special_tokens=False) for text in (probe, probe + answer))
    alone = both[: len(before)] == before
    ids = both[len(before) :] if alone else tokenizer.encode(answer, add_special_tokens=False)
    return torch.tensor(ids, dtype=torch.long)


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def end_tokens(tokenizer, generation_config) -> set[int]:
    """Every token that ends a completion: the tokenizer's and those of the generation config, one or a list."""
    listed = getattr(generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
