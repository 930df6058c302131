import pytest
from hypothesis import given
from hypothesis import strategies as st

from iapo.region import reasoning_length

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
