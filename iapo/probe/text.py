"""What a response's text says about its tokens: where the reasoning and its steps end, what it answers, how it ends."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from iapo.config import IapoConfig

# A token ends a reasoning step if its text ends with one of these, white space aside.
STEP_ENDS = (".", "!", "?", ";", "。", "！", "？", "；")


def reasoning_length(response_ids: Sequence[int], decode: Callable[[Sequence[int]], str], marker: str) -> int:
    """Tokens before the one in which the first `marker` begins; all of them if there is none (a truncated completion).

    The text is searched, not the token ids, because a tokenizer may merge the marker's first character with the text
    before it. A token that holds both counts as part of the marker.

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
    """(V,) 1 for tokens that end a reasoning step: they contain a new line or end with one of `STEP_ENDS`.

    A point inside a number counts too. That adds a probe, and no probe is wrong.

    Args:
        decode: token ids -> text.
        vocabulary: V.
    """
    texts = (decode([token]) for token in range(vocabulary))
    return torch.tensor(["\n" in text or text.rstrip().endswith(STEP_ENDS) for text in texts])


def region_length(
    response: torch.Tensor, mask: torch.Tensor, config: IapoConfig, tokenizer: Any, ends: Collection[int]
) -> int:
    """Tokens of the region of a response, which is what is probed: its first tokens, as `config.region` says.

    The token that ends the completion is never in it. With region "reasoning" the region ends before the first
    `config.exit_marker`, if there is one.

    Args:
        response: (R,) token ids.
        mask: (R,) 1 on the response's tokens, right-padded. Without a 1 the region is empty.
        ends: the tokens that end a completion, see `end_tokens`.
    """
    length = int(mask.sum())
    if length and int(response[length - 1]) in ends:
        length -= 1
    if config.region == "response" or length == 0:
        return length
    return min(length, reasoning_length(response.tolist(), lambda ids: decode(tokenizer, ids), config.exit_marker))


def answer_ids(tokenizer: Any, answer: str) -> torch.Tensor:
    """(A,) the tokens of `answer` alone, which may be empty; `iapo.probe.joins` writes them after the probe."""
    return torch.tensor(tokenizer.encode(answer, add_special_tokens=False), dtype=torch.long)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids as the model wrote it: special tokens and spaces are kept."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def end_tokens(tokenizer: Any, generation_config: Any) -> set[int]:
    """Every token that ends a completion: the tokenizer's and those of the generation config, where generation stops.

    They may differ: Qwen's chat models end with <|im_end|> or <|endoftext|>, and the tokenizer names one of them.

    Args:
        generation_config: its `eos_token_id` is one id, a list or None; may be None itself.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
