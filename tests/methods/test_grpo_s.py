"""GRPO-S against hand-computed numbers and a version in plain Python."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iapo.methods.grpo_s import GrpoS
from tests.methods.batches import make_batch, row_lists
from tests.methods.test_gtpo import WIDE, row

# Mean entropies 1, 3; 2, 1.
GROUP = [row(0, True, [0.5, 1.5]), row(0, True, [3.0]), row(0, False, [2.0]), row(0, False, [1.5, 0.5])]


def advantages(method, rows):
    """Per completion; all of its tokens have the same."""
    result = method.outcome_advantage(make_batch(rows))
    for i, r in enumerate(rows):
        assert (result[i, : r.length] == result[i, 0]).all() and not result[i, r.length :].any()
    return result[:, 0].tolist()


def approx(expected):
    return pytest.approx(expected, abs=2e-5, rel=2e-5)


def test_hand_computed():
    # r+ is 1/2 + 1/2 * 2 * (1, 3) / 4 = .75, 1.25 and r- is -1/2 - 1/2 * 2 * (1/2, 1) / 1.5 = -5/6, -7/6; over four
    # completions with two zeros their means are 1/2 and -1/2.
    plus, minus = (2.125 / 4 - 0.25) ** 0.5, (74 / 36 / 4 - 0.25) ** 0.5
    expected = [0.25 / plus, 0.75 / plus, (-5 / 6 + 0.5) / minus, (-7 / 6 + 0.5) / minus]
    assert advantages(GrpoS(alpha=0.5, **WIDE), GROUP) == approx(expected)


def test_hand_computed_over_each_side_alone():
    assert advantages(GrpoS(zscore_over="side", **WIDE), GROUP) == approx([-1, 1, 1, -1])


def test_tokens_are_clipped_before_their_mean_is_taken():
    rows = [row(0, True, [5.0, 0.0]), row(0, True, [0.24]), row(0, False, [0.2])]
    clipped = [row(0, True, [0.28, 0.2]), row(0, True, [0.24]), row(0, False, [0.2])]
    assert advantages(GrpoS(), rows) == advantages(GrpoS(), clipped)
    # Both means are 0.24, so the right ones are equal, and this is GRPO with population statistics.
    assert advantages(GrpoS(), rows) == approx([0.5**0.5, 0.5**0.5, -(2**0.5)])


@given(rows=row_lists, alpha=st.floats(0.05, 1), zscore_over=st.sampled_from(["group", "side"]))
def test_equals_plain_python(rows, alpha, zscore_over):
    alpha = 0.1 if zscore_over == "side" else alpha
    power = [1 if r.correct else -1 for r in rows]
    weight = [statistics.mean(min(max(h, 0.1), 1.2) for h in r.entropy) ** p for r, p in zip(rows, power, strict=True)]
    peers = [[k for k, o in enumerate(rows) if (o.group, o.correct) == (r.group, r.correct)] for r in rows]
    reward = [
        p * (1 - alpha + alpha * w / statistics.mean(weight[k] for k in peer))
        for p, w, peer in zip(power, weight, peers, strict=True)
    ]
    expected = []
    for i, r in enumerate(rows):
        counted = [reward[k] for k in peers[i]]
        if zscore_over == "group":
            counted += [0.0] * sum(o.group == r.group and o.correct != r.correct for o in rows)
        mean, std = statistics.mean(counted), statistics.pstdev(counted)
        expected.append((reward[i] - mean) / std if std > 1e-6 else 0.0)
    method = GrpoS(alpha=alpha, entropy_low=0.1, entropy_high=1.2, zscore_over=zscore_over)
    assert advantages(method, rows) == approx(expected)


@given(rows=row_lists, alpha=st.floats(0, 1))
def test_with_equal_entropies_it_is_grpo_on_right_and_wrong(rows, alpha):
    rows = [r._replace(entropy=[0.7] * r.length) for r in rows]
    expected = []
    for r in rows:
        group = [float(k.correct) for k in rows if k.group == r.group]
        std = statistics.pstdev(group)
        expected.append((r.correct - statistics.mean(group)) / std if std else 0.0)
    assert advantages(GrpoS(alpha=alpha), rows) == approx(expected)


@pytest.mark.parametrize("rows", [[row(0, True, [0.25])], [row(0, False, [0.21, 0.27])] * 3])
@pytest.mark.parametrize("zscore_over", ["group", "side"])
def test_without_variance_it_is_zero(rows, zscore_over):
    assert advantages(GrpoS(zscore_over=zscore_over), rows) == [0.0] * len(rows)


def test_it_has_the_checks_of_gtpo():
    with pytest.raises(ValueError, match="alpha: 2 must be a number from 0 to 1"):
        GrpoS(alpha=2)
    assert set(GrpoS.ignores) == {"shape_reward", "overlong"}
