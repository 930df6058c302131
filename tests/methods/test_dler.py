"""DLER against hand-computed numbers and a version in plain Python."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.methods import conflicts
from iapo.methods.dler import Dler
from iapo.methods.length_penalty import LengthPenalty
from tests.methods.batches import Row, make_batch, row_lists, step


def row(group, length, correct):
    return Row(group, length, correct, 1.5 if correct else -1.5, [0] * length, [0.0] * length)


def test_beyond_the_target_length_there_is_no_reward():
    batch = make_batch([row(0, 3, True), row(0, 4, True), row(0, 4, False), row(0, 3, False)])
    assert Dler(target_length=3).shape_reward(batch).tolist() == [1.5, -1.5, -1.5, -1.5]
    assert Dler(target_length=3, truncated_reward=0).shape_reward(batch).tolist() == [1.5, 0.0, 0.0, -1.5]


def test_one_scale_for_all_groups():
    # Rewards 1.5, -1.5 and 1.5, 1.5, 1.5, -1.5: A = 1.5, -1.5 and 0.75, 0.75, 0.75, -2.25, on 2, 1 and 1, 1, 1, 3
    # tokens: the mean over tokens is (3 - 1.5 + 2.25 - 6.75) / 9 = -1/3, that of squares (6.75 + 1.6875 + 15.1875) / 9.
    rows = [row(0, 2, True), row(0, 1, False), *[row(1, 1, True)] * 3, row(1, 3, False)]
    advantages, mask = step(Dler(target_length=3), make_batch(rows))
    std = (23.625 / 9 - 1 / 9) ** 0.5
    expected = torch.tensor([1.5, -1.5, 0.75, 0.75, 0.75, -2.25]).add(1 / 3).div(std)
    torch.testing.assert_close(advantages[:, 0], expected)
    assert mask.sum(1).tolist() == [2, 1, 1, 1, 1, 3]
    torch.testing.assert_close(advantages.sum(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_groups_without_signal_and_tokens_beyond_the_target_are_left_out():
    rows = [
        *[row(0, 2, True), row(0, 1, False), row(0, 5, True)],  # mixed; the last one is truncated to 3 tokens
        *[row(1, 2, True), row(1, 3, True)],  # all succeed
        *[row(2, 4, True), row(2, 2, False)],  # none does: the right one is too long
    ]
    advantages, mask = step(Dler(target_length=3), make_batch(rows))
    assert mask.sum(1).tolist() == [2, 1, 3, 0, 0, 0, 0]
    # A = 2, -1, -1 on 2, 1 and 3 tokens: mean 0, standard deviation sqrt(2).
    expected = torch.tensor([2**0.5, -(0.5**0.5), -(0.5**0.5)])
    torch.testing.assert_close(advantages[:3, 0], expected)
    assert not advantages[2, 3:].any() and not advantages[3:].any()


def test_a_batch_without_signal_has_advantages_of_zero():
    advantages, mask = step(Dler(target_length=3), make_batch([row(0, 2, True), row(0, 3, True), row(1, 4, True)]))
    assert not advantages.any() and mask.sum() == 9


@given(rows=row_lists, target=st.integers(1, 9), truncated=st.sampled_from([-1.5, 0.0]))
def test_equals_plain_python(rows, target, truncated):
    rewards = [r.reward if r.length <= target else truncated for r in rows]
    success = [r.correct and r.length <= target for r in rows]
    values, counts = {}, {}
    for i, r in enumerate(rows):
        members = [j for j, q in enumerate(rows) if q.group == r.group]
        if len({success[j] for j in members}) == 2:
            values[i] = rewards[i] - statistics.mean(rewards[j] for j in members)
            counts[i] = min(r.length, target)
    tokens = [values[i] for i in values for _ in range(counts[i])]
    mean, std = (statistics.mean(tokens), statistics.pstdev(tokens)) if tokens else (0, 0)
    advantages, mask = step(Dler(target, truncated), make_batch(rows))
    for i, r in enumerate(rows):
        expected = (values[i] - mean) / std if i in values and std > 1e-6 else 0.0
        n = counts.get(i, 0)
        assert mask[i].sum() == (n if values else r.length)
        torch.testing.assert_close(advantages[i, :n], torch.full((n,), expected), atol=1e-4, rtol=1e-4)
        assert not advantages[i, n:].any()


@pytest.mark.parametrize(
    "knobs,message",
    [
        ({"target_length": 0}, "target_length: 0 must be a whole number of at least 1"),
        ({"truncated_reward": None}, "truncated_reward: None must be a number.$"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        Dler(**knobs)


def test_a_target_beyond_the_response_budget_and_a_second_reward_are_refused():
    assert not list(Dler(target_length=100).problems(8, 100))
    assert next(iter(Dler(target_length=101).problems(8, 100))).startswith(
        "target_length: 101 exceeds data.max_response_length=100"
    )
    assert "only one method of a run may" in next(conflicts({"dler": Dler(), "length_penalty": LengthPenalty()}))
