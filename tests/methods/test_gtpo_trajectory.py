"""GTPO (Simoni et al.) against hand-computed numbers and a version in plain Python."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.methods.gtpo_trajectory import GtpoTrajectory
from tests.methods.batches import Row, make_batch, row_lists, step


def row(group, tokens, reward, entropy=0.0):
    return Row(group, len(tokens), reward > 0, float(reward), list(tokens), [entropy] * len(tokens))


def weights(rows, method=None):
    batch = make_batch(rows)
    weight = (method or GtpoTrajectory()).token_weight(batch, torch.ones(batch.response_mask.shape))
    return [weight[i, : r.length].tolist() for i, r in enumerate(rows)]


def test_shared_starts_and_ends_are_spared_in_bad_and_amplified_in_good_completions():
    rows = [
        row(0, [1, 2, 5, 5, 8, 9], reward=1.5),
        row(0, [1, 2, 6, 5, 9], reward=-1.5),  # 5 stands at position 3 of both, but behind a difference
        row(0, [3, 2, 8, 9], reward=-1.5),  # its end is longer, its start isn't shared
        row(0, [1, 2], reward=-1.5),  # shares only the start
    ]
    assert weights(rows) == [[2, 2, 1, 1, 2, 2], [0, 0, 1, 1, 0], [1, 1, 0, 0], [0, 0]]


def test_a_token_in_both_runs_counts_once():
    assert weights([row(0, [1, 2, 3], reward=1), row(0, [1, 2, 3], reward=-1)]) == [[2, 2, 2], [0, 0, 0]]


def test_only_the_other_sign_of_the_same_prompt_is_in_conflict():
    assert weights([row(0, [1, 2], reward=1), row(0, [1, 2], reward=1), row(1, [1, 2], reward=-1)]) == [[1, 1]] * 3
    # Rewards 1, 0, -1: the second is at the mean, neither good nor bad.
    assert weights([row(0, [4], reward=1), row(0, [5], reward=0), row(0, [5], reward=-1)]) == [[1]] * 3


def test_the_advantage_is_centred_and_pays_for_entropy():
    rows = [row(0, [1, 2], reward=1.5, entropy=0.5), row(0, [1, 3, 4], reward=-0.5, entropy=0.2)]
    advantages, mask = step(GtpoTrajectory(), make_batch(rows))
    # A = 1 and -1 before the entropy's 0.1 <H>; the first token is in conflict.
    torch.testing.assert_close(advantages, torch.tensor([[1.9, 0.95, 0.0], [0.0, -1.02, -1.02]]))
    assert torch.equal(mask, make_batch(rows).response_mask)  # no token leaves the mean of the loss


def test_completions_of_high_entropy_are_filtered_if_the_policy_began_below():
    calm, wild = row(0, [1], reward=1, entropy=0.6), row(0, [2], reward=-1, entropy=0.8)
    assert weights([calm, calm, wild]) == [[1], [1], [0]]  # the first step's mean, 2/3, is below ln 2
    assert weights([calm, wild, wild]) == [[1], [1], [1]]  # above
    method = GtpoTrajectory()
    weights([calm, calm], method)
    assert method.state_dict() == {"initial_entropy": pytest.approx(0.6)}
    assert weights([wild, wild], method) == [[0], [0]]


@given(rows=row_lists, amplification=st.floats(1, 3), gamma=st.floats(0, 1), limit=st.floats(0, 2))
def test_equals_plain_python(rows, amplification, gamma, limit):
    means = {g: statistics.mean(r.reward for r in rows if r.group == g) for g in {r.group for r in rows}}
    entropy = [statistics.mean(r.entropy) for r in rows]
    initial = statistics.mean(entropy)
    if any(abs(h - limit) < 1e-5 for h in [*entropy, initial]):
        return  # float32 may round to the other side
    advantage = [r.reward - means[r.group] for r in rows]

    def shared(i, position):
        """Whether a completion of the other sign has i's token there; from the end if position is negative."""
        return any(
            rows[j].group == rows[i].group
            and advantage[i] * advantage[j] < -1e-9
            and -rows[j].length <= position < rows[j].length
            and rows[j].tokens[position] == rows[i].tokens[position]
            for j in range(len(rows))
        )

    got, _ = step(GtpoTrajectory(amplification, gamma, limit), make_batch(rows))
    for i, r in enumerate(rows):
        start = next((t for t in range(r.length) if not shared(i, t)), r.length)
        end = next((t for t in range(r.length) if not shared(i, -1 - t)), r.length)
        for t in range(r.length):
            conflict = t < start or t >= r.length - end
            weight = (amplification if advantage[i] > 0 else 0) if conflict else 1
            if entropy[i] > limit >= initial:
                weight = 0
            expected = weight * (advantage[i] - gamma * entropy[i])
            assert got[i, t].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "knobs,message",
    [
        ({"amplification": 0.5}, "amplification: 0.5 must be a number of at least 1"),
        ({"entropy_weight": -1}, "entropy_weight: -1 must be a number of at least 0"),
        ({"max_entropy": math.inf}, "max_entropy: inf must be a number of at least 0"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        GtpoTrajectory(**knobs)
