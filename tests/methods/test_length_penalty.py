"""The length penalties against hand-computed numbers and a version in plain Python."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.methods.length_penalty import LengthPenalty
from tests.methods.batches import Row, make_batch, row_lists

ROWS = [Row(0, length, correct, 1.5 if correct else -1.5, [0] * length, [0.0] * length)
        for length, correct in ((2, True), (6, True), (4, True), (8, False))]  # fmt: skip


@pytest.mark.parametrize(
    "form,expected",
    [
        ("linear", [1.5 + 0.2 * 0.5, 1.5 - 0.2 * 0.5, 1.5, -1.5]),
        # The mean of 2, 6, 4 is 4, the population's standard deviation sqrt(8/3).
        ("sigmoid", [1.5 - 0.2 / (1 + math.exp(6**0.5 / 2)), 1.5 - 0.2 / (1 + math.exp(-(6**0.5) / 2)), 1.4, -1.5]),
        ("cosine", [1.5 - 0.1 * (1 - 2**-0.5), 1.5 - 0.1 * (1 + 2**-0.5), 1.4, -1.5]),
        ("raw", [1.5 - 0.05, 1.5 - 0.15, 1.5 - 0.1, -1.5 - 0.2]),
    ],
)
def test_hand_computed(form, expected):
    rewards = LengthPenalty(form=form, weight=0.2, max_length=8).shape_reward(make_batch(ROWS))
    torch.testing.assert_close(rewards, torch.tensor(expected))


@given(rows=row_lists, form=st.sampled_from(["linear", "sigmoid", "cosine", "raw"]), weight=st.floats(0, 2))
def test_equals_plain_python(rows, form, weight):
    expected = []
    for row in rows:
        lengths = [r.length for r in rows if r.group == row.group and r.correct]
        equal = len(set(lengths)) < 2
        if form == "raw":
            price = -row.length / 10
        elif not row.correct or (equal and form != "cosine"):
            price = 0
        elif form == "linear":
            price = 0.5 - (row.length - min(lengths)) / (max(lengths) - min(lengths))
        elif form == "sigmoid":
            z = (row.length - statistics.mean(lengths)) / statistics.pstdev(lengths)
            price = -1 / (1 + math.exp(-z))
        else:
            price = -(1 - math.cos(math.pi * row.length / 10)) / 2
        expected.append(row.reward + weight * price)
    rewards = LengthPenalty(form, weight, max_length=10).shape_reward(make_batch(rows))
    torch.testing.assert_close(rewards, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "knobs,message",
    [
        ({"form": "square"}, "form: 'square' must be one of linear, sigmoid, cosine, raw"),
        ({"weight": -1}, "weight: -1 must be a number of at least 0"),
        ({"max_length": 0}, "max_length: 0 must be a whole number of at least 1"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        LengthPenalty(**knobs)


def test_cosine_is_never_cheaper_for_a_longer_response():
    lengths = [1, 32, 64, 65, 96, 128]
    rows = [Row(0, length, True, 1.0, [0] * length, [0.0] * length) for length in lengths]
    rewards = LengthPenalty("cosine", 1.0, max_length=64).shape_reward(make_batch(rows)).tolist()
    assert rewards == sorted(rewards, reverse=True) and rewards[2:] == [0, 0, 0, 0]


@pytest.mark.parametrize("form,problems", [("linear", 0), ("cosine", 1), ("raw", 1)])
def test_a_price_that_ends_before_the_longest_response_is_refused(form, problems):
    found = list(LengthPenalty(form, max_length=64).problems(8, 128))
    assert len(found) == problems and not list(LengthPenalty(form, max_length=128).problems(8, 128))
    assert all(line.startswith("max_length: 64 is below data.max_response_length=128; set it to") for line in found)
