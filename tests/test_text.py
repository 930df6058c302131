import pytest
from hypothesis import given
from hypothesis import strategies as st

from iapo.probe.text import final_answer, reasoning_length, step_ends

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


def test_final_answer_by_hand():
    probe, end = "</think>\n<answer>", "</answer>"
    assert final_answer("<think>a</think>\n<answer>12</answer>", probe, end) == "12"
    assert final_answer("</think>\n<answer>1</answer></think>\n<answer>2</answer>", probe, end) == "2"
    assert final_answer("<think>a</think>\n<answer>12", probe, end) == ""
    assert final_answer("<answer>12</answer>", probe, end) == ""
