"""GTPO against hand-computed numbers and a version in plain Python."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.methods import conflicts
from iapo.methods.gtpo import Gtpo
from iapo.methods.length_penalty import LengthPenalty
from tests.methods.batches import Row, make_batch, row_lists


def row(group, correct, entropy):
    return Row(group, len(entropy), correct, 0.0, [0] * len(entropy), entropy)


WIDE = {"entropy_low": 0.01, "entropy_high": 100.0}
GROUP = [row(0, True, [1.0, 3.0]), row(0, True, [3.0]), row(0, False, [2.0]), row(0, False, [1.0, 1.0])]


def advantages(method, rows):
    """Per completion, a list of its tokens' advantages."""
    result = method.outcome_advantage(make_batch(rows))
    assert result.dtype == torch.float32
    assert all(not result[i, r.length :].any() for i, r in enumerate(rows))
    return [result[i, : r.length].tolist() for i, r in enumerate(rows)]


def approx(expected):
    return [pytest.approx(values, abs=2e-5, rel=2e-5) for values in expected]


def test_hand_computed():
    # r+ is 1/2 + 1/2 * 2 * (1, 3) / 4 at the first token and 1 at the second, where one right answer is alive: .75, 1;
    # 1.25. r- is -1/2 - 1/2 * 2 * (1/2, 1) / 1.5, then -1: -5/6; -7/6, -1. Over six tokens with three zeros their means
    # are 1/2 and -1/2, their variances .75^2 + 1 + 1.25^2 and (25 + 49 + 36) / 36, by 6, less 1/4.
    plus, minus = (3.125 / 6 - 0.25) ** 0.5, (110 / 36 / 6 - 0.25) ** 0.5
    expected = [
        [0.25 / plus, 0.5 / plus],
        [0.75 / plus],
        [(-5 / 6 + 0.5) / minus],
        [(-7 / 6 + 0.5) / minus, -0.5 / minus],
    ]
    assert advantages(Gtpo(alpha=0.5, **WIDE), GROUP) == approx(expected)


def test_hand_computed_over_each_side_alone():
    # The deviations from the sides' means 1 and -1 are alpha times (-1/2, 0; 1/2) and (1/3; -1/3, 0).
    plus, minus = (0.5 / 3) ** 0.5, (2 / 27) ** 0.5
    expected = [[-0.5 / plus, 0.0], [0.5 / plus], [1 / 3 / minus], [-1 / 3 / minus, 0.0]]
    assert advantages(Gtpo(zscore_over="side", **WIDE), GROUP) == approx(expected)


def test_entropies_are_clipped():
    rows = [row(0, True, [5.0, 0.0]), row(0, True, [0.24, 0.1]), row(0, False, [0.0]), row(0, False, [9.0])]
    clipped = [row(0, True, [0.28, 0.2]), row(0, True, [0.24, 0.2]), row(0, False, [0.2]), row(0, False, [0.28])]
    assert advantages(Gtpo(), rows) == advantages(Gtpo(), clipped)


knobs = st.fixed_dictionaries(
    {"alpha": st.floats(0.05, 1), "entropy_low": st.floats(0.01, 0.5), "entropy_high": st.floats(0.5, 3)}
)


@given(rows=row_lists, knobs=knobs, zscore_over=st.sampled_from(["group", "side"]))
def test_equals_plain_python(rows, knobs, zscore_over):
    if zscore_over == "side":
        knobs["alpha"] = 0.1
    reward = {}
    for i, r in enumerate(rows):
        for t in range(r.length):
            weights = [
                min(max(k.entropy[t], knobs["entropy_low"]), knobs["entropy_high"]) ** (1 if r.correct else -1)
                for k in [r, *rows]
                if k.group == r.group and k.correct == r.correct and t < k.length
            ]
            share = weights[0] / statistics.mean(weights[1:])
            reward[i, t] = (1 if r.correct else -1) * (1 - knobs["alpha"] + knobs["alpha"] * share)
    expected = []
    for i, r in enumerate(rows):
        counted = [
            reward[k, t] if other.correct == r.correct else 0.0
            for k, other in enumerate(rows)
            if other.group == r.group and (zscore_over == "group" or other.correct == r.correct)
            for t in range(other.length)
        ]
        mean, std = statistics.mean(counted), statistics.pstdev(counted)
        expected.append([(reward[i, t] - mean) / std if std > 1e-6 else 0.0 for t in range(r.length)])
    assert advantages(Gtpo(zscore_over=zscore_over, **knobs), rows) == approx(expected)


@given(rows=row_lists, alpha=st.floats(0, 1))
def test_with_equal_entropies_it_is_grpo_on_right_and_wrong_with_statistics_over_tokens(rows, alpha):
    rows = [r._replace(entropy=[0.7] * r.length) for r in rows]
    expected = []
    for r in rows:
        tokens = [k.correct for k in rows if k.group == r.group for _ in range(k.length)]
        right = sum(tokens) / len(tokens)
        mixed = 0 < right < 1
        expected.append([(r.correct - right) / math.sqrt(right * (1 - right)) if mixed else 0.0] * r.length)
    assert advantages(Gtpo(alpha=alpha), rows) == approx(expected)


@given(rows=row_lists)
def test_a_group_does_not_see_the_others(rows):
    alone = [advantages(Gtpo(), [r for r in rows if r.group == g]) for g in sorted({r.group for r in rows})]
    assert advantages(Gtpo(), rows) == [values for group in alone for values in group]


@given(rows=row_lists)
def test_over_a_side_alone_neither_side_gains(rows):
    result = advantages(Gtpo(zscore_over="side"), rows)
    for side in {(r.group, r.correct) for r in rows}:
        total = [sum(a) for a, r in zip(result, rows, strict=True) if (r.group, r.correct) == side]
        assert sum(total) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "rows",
    [
        [row(0, True, [0.25])],
        [row(0, False, [0.21, 0.27])],
        [row(0, True, [0.25, 0.22]), row(0, True, [0.25, 0.22])],
        [row(0, False, [0.25])] * 3,
    ],
)
@pytest.mark.parametrize("zscore_over", ["group", "side"])
def test_without_variance_it_is_zero(rows, zscore_over):
    assert advantages(Gtpo(zscore_over=zscore_over), rows) == [[0.0] * r.length for r in rows]


def test_rounding_is_not_blown_up_to_unit_variance():
    rows = [row(0, False, [0.202])] * 5 + [row(0, False, [0.202, 0.202])]
    assert advantages(Gtpo(alpha=0.3), rows) == [[0.0]] * 5 + [[0.0, 0.0]]


def test_an_all_right_group_has_only_entropies_to_compare():
    rows = [row(0, True, [0.28]), row(0, True, [0.2])]
    assert advantages(Gtpo(), rows) == approx([[1.0], [-1.0]])


@pytest.mark.parametrize(
    "knobs,message",
    [
        ({"alpha": 1.5}, "alpha: 1.5 must be a number from 0 to 1"),
        ({"entropy_low": 0}, "entropy_low: 0 must be a number of at least 1e-06"),
        ({"entropy_low": 0.3}, "entropy_high: 0.28 must be a number of at least 0.3"),
        ({"zscore_over": "batch"}, "zscore_over: 'batch' must be one of group, side"),
        (
            {"zscore_over": "side", "alpha": 0.2},
            "alpha: 0.2 has no effect with zscore_over=side; use zscore_over=group",
        ),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        Gtpo(**knobs)


def test_a_shaped_reward_is_refused():
    (message,) = conflicts({"gtpo": Gtpo(), "length_penalty": LengthPenalty()})
    reason = "it judges by right and wrong alone"
    assert message == f"methods: the shape_reward of length_penalty has no effect with gtpo: {reason}; drop one."
    assert "overlong" in Gtpo.ignores
