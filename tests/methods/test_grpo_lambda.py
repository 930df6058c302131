"""GRPO-lambda against hand-computed numbers and a version in plain Python."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.methods.grpo_lambda import GrpoLambda
from iapo.methods.length_penalty import LengthPenalty
from tests.methods.batches import Row, make_batch, make_rows, row_lists


def row(group, length, correct):
    return Row(group, length, correct, 1.5 if correct else -1.5, [0] * length, [0.0] * length)


# Accuracies 1/2, 3/4, 3/4 and 1/4; the second group's right answers have 2, 4 and 6 tokens.
ROWS = [
    *[row(0, length, correct) for length, correct in ((2, True), (8, True), (3, False), (3, False))],
    *[row(1, length, correct) for length, correct in ((2, True), (4, True), (6, True), (9, False))],
    *[row(2, length, correct) for length, correct in ((5, False), (1, True), (1, True), (3, True))],
    *[row(3, length, correct) for length, correct in ((7, True), (1, False), (1, False), (1, False))],
]


def test_only_the_most_accurate_group_pays_for_length():
    rewards = GrpoLambda(share=0.25, weight=0.2).shape_reward(make_batch(ROWS))
    # Of two equally accurate groups the first; population standard deviation sqrt(8/3), so z = -+sqrt(3/2) and 0.
    expected = torch.tensor([r.reward for r in ROWS])
    expected[4:7] -= torch.tensor([0.2 / (1 + math.exp(1.5**0.5)), 0.1, 0.2 / (1 + math.exp(-(1.5**0.5)))])
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize("share,paying", [(0, []), (0.2, [1]), (0.3, [1, 2]), (0.5, [1, 2]), (1, [0, 1, 2])])
def test_the_share_is_rounded_up(share, paying):
    rewards = GrpoLambda(share, weight=0.2).shape_reward(make_batch(ROWS))
    paid = rewards != torch.tensor([r.reward for r in ROWS])
    # The right answers of group 3 are one, which has nothing to be compared with.
    assert {ROWS[i].group for i in paid.nonzero().flatten().tolist()} == set(paying)


def test_a_share_of_all_is_the_length_penalty():
    batch = make_batch(make_rows([5, 6, 4], seed=1))
    assert torch.equal(GrpoLambda(1.0, 0.3).shape_reward(batch), LengthPenalty("sigmoid", 0.3).shape_reward(batch))


def test_rounding_errors_take_no_group_more():
    rows = [r for group in range(25) for r in (row(group, 1, True), row(group, 2, True))]
    rewards = GrpoLambda(share=0.28, weight=0.2).shape_reward(make_batch(rows))  # 0.28 * 25 > 7 in float64
    assert (rewards < 1.5).sum() == 14


@given(rows=row_lists, share=st.floats(0, 1), weight=st.floats(0, 2))
def test_equals_plain_python(rows, share, weight):
    groups = sorted({r.group for r in rows})
    accuracy = {g: statistics.mean(r.correct for r in rows if r.group == g) for g in groups}
    ranked = sorted(groups, key=lambda g: (-accuracy[g], g))
    top = [g for rank, g in enumerate(ranked) if rank < share * len(groups) - 1e-9]
    expected = []
    for r in rows:
        lengths = [q.length for q in rows if q.group == r.group and q.correct]
        price = 0.0
        if r.correct and r.group in top and len(set(lengths)) > 1:
            z = (r.length - statistics.mean(lengths)) / statistics.pstdev(lengths)
            price = weight / (1 + math.exp(-z))
        expected.append(r.reward - price)
    rewards = GrpoLambda(share, weight).shape_reward(make_batch(rows))
    torch.testing.assert_close(rewards, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "knobs,message",
    [
        ({"share": 1.5}, "share: 1.5 must be a number from 0 to 1"),
        ({"share": -0.2}, "share: -0.2 must be a number from 0 to 1"),
        ({"weight": "much"}, "weight: 'much' must be a number of at least 0"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        GrpoLambda(**knobs)
