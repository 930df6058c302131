"""LASER and LASER-D against hand-computed numbers and a version in plain Python."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.methods.laser import Laser
from tests.methods.batches import Row, make_batch, make_rows, row_lists


def rows_of(group, lengths, correct):
    """One prompt, whose first `correct` completions are right; rewards 1.5 and -1.5."""
    flags = [n < correct for n in range(len(lengths))]
    rewards = [1.5 if flag else -1.5 for flag in flags]
    return [
        Row(group, length, flag, reward, [0] * length, [0.0] * length)
        for length, flag, reward in zip(lengths, flags, rewards, strict=True)
    ]


def test_right_answers_within_the_target_get_the_bonus():
    batch = make_batch(rows_of(0, [3, 4, 5, 3], correct=3))
    rewards = Laser(target_length=4).shape_reward(batch)
    assert rewards.tolist() == [2.0, 2.0, 1.5, -1.5]
    assert batch.rewards.tolist() == [1.5, 1.5, 1.5, -1.5]  # the batch itself stays


def test_adaptive_targets_by_hand():
    # K = 6, so |C| = 4, 2, 1. Easy (4 of 6 right): a quarter of 6 lengths, rounded up, is 2, and the second shortest
    # has 4 tokens. Medium (2 of 6): half of 6 is 3, third shortest: 6. Hard (1 of 6): all must fit: 9.
    easy = rows_of(0, [7, 3, 4, 5, 6, 7], correct=4)
    medium = rows_of(1, [6, 5, 4, 9, 8, 7], correct=2)
    hard = rows_of(2, [9, 1, 2, 3, 4, 5], correct=1)
    method = Laser(target_length=2, adaptive=True)
    rewards = method.shape_reward(make_batch(easy + medium + hard))
    assert method.state_dict() == {
        "target_easy": 4,
        "target_medium": 6,
        "target_hard": 9,
        "lengths": {"easy": [], "medium": [], "hard": []},
    }
    expected = [1.5, 2.0, 2.0, 1.5, -1.5, -1.5] + [2.0, 2.0, -1.5, -1.5, -1.5, -1.5] + [2.0] + [-1.5] * 5
    assert rewards.tolist() == expected


def test_the_target_is_never_below_its_lower_bound():
    method = Laser(target_length=5, adaptive=True)
    method.shape_reward(make_batch(rows_of(0, [2, 3, 4], correct=3)))
    assert method.state_dict()["target_easy"] == 5


def test_targets_follow_the_completions_since_the_last_update():
    method = Laser(adaptive=True, every=2)
    targets = []
    for step, length in enumerate([4, 9, 2, 6, 6], start=1):
        method.shape_reward(make_batch(rows_of(0, [length] * 3, correct=3), step=step))
        targets.append(method.state_dict()["target_easy"])
    # Updates at steps 1, 3 and 5, from the lengths 4, then 9 and 2, then 6 and 6; half of six completions are 2 long.
    assert targets == [4, 4, 2, 2, 6]


def test_a_level_that_was_not_seen_keeps_its_target_or_has_none():
    method = Laser(adaptive=True, every=1)
    method.shape_reward(make_batch(rows_of(0, [3, 3, 3], correct=3)))
    method.shape_reward(make_batch(rows_of(0, [8, 8, 8], correct=0)))
    assert method.state_dict()["target_easy"] == 3
    late = Laser(adaptive=True)
    late.shape_reward(make_batch(rows_of(0, [3, 3, 3], correct=3), step=1))
    rewards = late.shape_reward(make_batch(rows_of(0, [9, 8, 7], correct=1), step=2))  # hard, never seen before
    assert rewards.tolist() == [2.0, -1.5, -1.5]


@given(rows=row_lists, target=st.integers(1, 8), bonus=st.floats(0, 2))
def test_laser_equals_plain_python(rows, target, bonus):
    expected = [r.reward + (bonus if r.correct and r.length <= target else 0) for r in rows]
    rewards = Laser(target, bonus).shape_reward(make_batch(rows))
    torch.testing.assert_close(rewards, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@given(
    sizes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=6),
    every=st.integers(1, 3),
    lowest=st.integers(1, 6),
)
def test_laser_d_equals_plain_python(sizes, every, lowest):
    method = Laser(lowest, 0.5, adaptive=True, every=every)
    seen, targets = {"easy": [], "medium": [], "hard": []}, {}
    for step, groups in enumerate(sizes, start=1):
        rows = make_rows(groups, seed=step)
        level = {}
        for group in range(len(groups)):
            members = [r for r in rows if r.group == group]
            accuracy = sum(r.correct for r in members) / len(members)
            level[group] = "easy" if accuracy >= 2 / 3 else "medium" if accuracy >= 1 / 3 else "hard"
            seen[level[group]] += [r.length for r in members]
        if step % every == (1 if every > 1 else 0):
            K = max(groups)
            for name, fewest in (("easy", math.ceil(2 * K / 3)), ("medium", math.ceil(K / 3)), ("hard", 1)):
                if seen[name]:
                    length = lowest
                    while sum(n <= length for n in seen[name]) * fewest < len(seen[name]):
                        length += 1
                    targets[name], seen[name] = length, []
        expected = [
            r.reward + (0.5 if r.correct and r.length <= targets.get(level[r.group], 10**9) else 0) for r in rows
        ]
        rewards = method.shape_reward(make_batch(rows, step=step))
        torch.testing.assert_close(rewards, torch.tensor(expected))


def test_laser_d_resumes_where_it_stopped():
    batches = [make_batch(make_rows([4, 4, 4], seed), step=seed + 1) for seed in range(9)]
    one, first, second = (Laser(2, adaptive=True, every=4) for _ in range(3))
    for batch in batches[:6]:
        one.shape_reward(batch)
        first.shape_reward(batch)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in batches[6:]:
        assert torch.equal(one.shape_reward(batch), second.shape_reward(batch))
    assert one.state_dict() == second.state_dict()
    assert {"target_easy", "target_hard"} <= set(one.state_dict())


def test_laser_d_does_not_depend_on_the_order_of_completions():
    rows = make_rows([5, 6], seed=3)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).tolist()
    rewards = Laser(adaptive=True).shape_reward(make_batch(rows))
    permuted = Laser(adaptive=True).shape_reward(make_batch([rows[i] for i in order]))
    assert torch.equal(permuted, rewards[order])


@pytest.mark.parametrize(
    "knobs,message",
    [
        ({"target_length": 0}, "target_length: 0 must be a whole number of at least 1"),
        ({"bonus": -0.1}, "bonus: -0.1 must be a number of at least 0"),
        ({"every": 1.5}, "every: 1.5 must be a whole number of at least 1"),
        ({"every": 5}, "every: 5 has no effect with adaptive=false; set adaptive=true."),
        ({"adaptive": "yes"}, "adaptive: 'yes' must be true or false"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        Laser(**knobs)


def test_a_target_beyond_the_response_budget_is_refused():
    assert not list(Laser(target_length=99).problems(8, 100))
    assert next(iter(Laser(target_length=100).problems(8, 100))).startswith(
        "target_length: 100 of data.max_response_length=100 tokens gives every right answer the bonus"
    )
