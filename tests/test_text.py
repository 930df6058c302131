from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.config import IapoConfig
from iapo.probe.text import (
    decode,
    end_tokens,
    reasoning_length,
    region_length,
    step_ends,
)

MARKER = "</think>"


def length(tokens):
    """Tokens are texts here, so that decoding is joining."""
    return reasoning_length(tokens, "".join, MARKER)


@pytest.mark.parametrize(
    "tokens,expected",
    [
        (["a", "b", "</think>", "c"], 2),
        (["a", "b", "</", "think", ">", "c"], 2),
        (["a", "b.</", "think>", "c"], 1),  # a token that holds reasoning and marker counts as marker
        (["a", "</think>", "b", "</think>"], 1),  # the first marker counts
        (["</think>"], 0),
        (["a", "b", "</thin"], 3),  # truncated before the marker is complete
        ([], 0),
    ],
)
def test_reasoning_length_by_hand(tokens, expected):
    assert length(tokens) == expected


@given(
    before=st.lists(st.sampled_from(["x", "yy", " ", "<"]), max_size=30), cut=st.lists(st.integers(1, 7), max_size=4)
)
def test_finds_the_marker_however_it_is_tokenised(before, cut):
    pieces, position = [], 0
    for end in sorted({*cut, len(MARKER)}):
        pieces.append(MARKER[position:end])
        position = end
    assert length(before + pieces + ["z"]) == len(before)


def test_step_ends_by_hand():
    texts = ["a", ".", " end.", "3;", "x\n\n", "\n x", "a.b", "?! ", "。", ""]
    assert step_ends(lambda ids: texts[ids[0]], len(texts)).tolist() == [
        *(False, True, True, True, True, True, False, True, True, False)
    ]


class Tokenizer:
    """Tokens of one character each, but for those in `merged`, which are found first."""

    def __init__(self, *merged, eos_token_id=None):
        self.vocabulary = [*merged, *map(chr, range(32, 127)), "\n"]
        self.eos_token_id = eos_token_id

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        ids = []
        while text:
            ids.append(next(i for i, token in enumerate(self.vocabulary) if text.startswith(token)))
            text = text[len(self.vocabulary[ids[-1]]) :]
        return ids

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(self.vocabulary[int(i)] for i in ids)

    def texts(self, ids):
        return [self.vocabulary[i] for i in ids]


@pytest.mark.parametrize(
    "text,region,expected",
    [
        ("ab</think>c<eos>", "reasoning", 2),
        ("ab</think>c<eos>", "response", 4),  # a, b, </think>, c
        ("abc<eos>", "reasoning", 3),  # it ended without a marker
        ("abc<eos>", "response", 3),
        ("abc", "reasoning", 3),  # truncated: its last token counts
        ("abc", "response", 3),
        ("</think>c<eos>", "reasoning", 0),
        ("<eos>", "response", 0),
        ("a<eos>b", "response", 3),  # an end token inside is not the end
    ],
)
def test_region_length_by_hand(text, region, expected):
    tokenizer = Tokenizer("</think>", "<eos>")
    response = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    config = IapoConfig(region=region)
    assert region_length(response, torch.ones_like(response), config, tokenizer, {1}) == expected
    # Padding that looks like another marker and another end changes nothing.
    padded = torch.cat([response, torch.tensor([0, 1])])
    mask = torch.cat([torch.ones_like(response), torch.zeros(2, dtype=torch.long)])
    assert region_length(padded, mask, config, tokenizer, {1}) == expected
    assert region_length(padded, torch.zeros_like(mask), config, tokenizer, {1}) == 0


def test_decode_keeps_special_tokens_and_spaces():
    tokenizer = Tokenizer("<eos>")
    text = "a , b <eos>"
    assert decode(tokenizer, tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    "own,listed,expected",
    [
        (1, None, {1}),
        (1, 2, {1, 2}),
        (1, [1, 3], {1, 3}),
        (None, [3], {3}),
        (None, None, set()),
    ],
)
def test_end_tokens_by_hand(own, listed, expected):
    assert end_tokens(Tokenizer(eos_token_id=own), SimpleNamespace(eos_token_id=listed)) == expected


def test_without_a_generation_config_only_the_tokenizers_token_ends():
    assert end_tokens(Tokenizer(eos_token_id=1), None) == {1}
