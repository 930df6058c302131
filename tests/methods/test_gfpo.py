"""GFPO against hand-computed numbers and a version in plain Python."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import agg_loss

from iapo.methods.gfpo import Gfpo
from tests.methods.batches import Row, grpo_naive, make_batch, row_lists, step


def kept(method, rows):
    """Per completion, whether it trains."""
    return method.keep_completions(make_batch(rows)).tolist()


def row(group, length, reward):
    return Row(group, length, reward > 0, reward, [0] * length, [0.0] * length)


GROUP = [row(0, 5, 1.5), row(0, 2, -1.5), row(0, 3, 0.5), row(0, 1, 0.5), row(0, 4, -0.5)]


def test_the_shortest_train_and_are_compared_among_themselves():
    advantages, mask = step(Gfpo(k=3), make_batch(GROUP))
    # Lengths 2, 3 and 1 stay, with rewards -1.5, 0.5, 0.5: mean -1/6, sample standard deviation sqrt(4/3).
    std = (4 / 3) ** 0.5
    expected = [0, (-1.5 + 1 / 6) / std, (0.5 + 1 / 6) / std, (0.5 + 1 / 6) / std, 0]
    torch.testing.assert_close(advantages[:, 0], torch.tensor(expected))
    assert mask.sum(1).tolist() == [5, 2, 3, 1, 4]


def test_the_loss_is_a_mean_over_the_tokens_of_all_completions():
    """Equation 2 of the paper: the 15 tokens of the group, 6 of them in S."""
    advantages, mask = step(Gfpo(k=3), make_batch(GROUP))
    ratios = torch.ones_like(advantages).requires_grad_()
    agg_loss(-advantages * ratios, mask, "token-mean").backward()
    std = (4 / 3) ** 0.5
    expected = torch.tensor([0, 4 / 3, -2 / 3, -2 / 3, 0]) / std / 15
    torch.testing.assert_close(ratios.grad[:, 0], expected)
    # A KL term is over the tokens of all completions, too.
    kl = torch.ones_like(advantages).requires_grad_()
    agg_loss(kl, mask, "token-mean").backward()
    torch.testing.assert_close(kl.grad.sum(1), torch.tensor([5, 2, 3, 1, 4]) / 15)


def test_the_best_by_reward_per_token_train():
    # Above the group's lowest reward -1.5: 3/5, 0/2, 2/3, 2/1, 1/4.
    assert kept(Gfpo(k=2, by="reward_per_token"), GROUP) == [False, False, True, True, False]


def test_positive_rewards_per_token_are_taken_as_they_are_and_ties_keep_the_shorter():
    method, rewards, lengths = Gfpo(k=2, by="reward_per_token"), (1.5, 0.5, 1.5, 0.5), (50, 10, 45, 5)
    rows = [row(0, *x) for x in zip(lengths, rewards, strict=True)]
    assert kept(method, rows) == [False, True, False, True]  # 0.03, 0.05, 0.033 and 0.1
    assert kept(method, [row(0, n, -0.5) for n in (5, 4, 1, 2)]) == [False, False, True, True]


def test_a_hard_prompt_keeps_more():
    def of_accuracy(group, correct):
        return [row(group, n + 1, 0.5 if n < correct else -0.5) for n in range(8)]

    method = Gfpo(adaptive=[6, 5, 4, 3])
    for correct in (0, 2, 4, 6):  # the quartiles become 0, 2 and 4 of 8
        kept(method, of_accuracy(0, correct))
    assert [sum(kept(method, of_accuracy(0, correct))) for correct in (0, 2, 4, 7)] == [6, 5, 4, 3]


def test_where_most_prompts_are_solved_the_solved_ones_are_easy():
    solved, half = [row(0, n + 1, 0.5) for n in range(8)], [row(1, n + 1, 0.5 if n % 2 else -0.5) for n in range(8)]
    method = Gfpo(adaptive=[6, 5, 4, 3])
    for rows in (half, solved, solved, solved):
        count = sum(kept(method, rows))
    assert count == 3 and sum(kept(method, half)) == 6


@given(rows=row_lists, k=st.integers(2, 5), by=st.sampled_from(["length", "reward_per_token"]))
def test_equals_plain_python(rows, k, by):
    chosen = []
    for group in sorted({r.group for r in rows}):
        members = [i for i, r in enumerate(rows) if r.group == group]
        lowest = min(0.0, *(rows[i].reward for i in members))
        # By float32, in which equal ratios such as 1/3 and 2/6 are equal too.
        ratio = {i: torch.tensor(rows[i].reward - lowest) / rows[i].length for i in members}
        score = {i: 0 if by == "length" else -ratio[i].item() for i in members}
        chosen += sorted(members, key=lambda i: (score[i], rows[i].length, i))[:k]
    chosen.sort()
    values = grpo_naive([rows[i].group for i in chosen], [rows[i].reward for i in chosen])
    advantages, mask = step(Gfpo(k=k, by=by), make_batch(rows))
    for i, r in enumerate(rows):
        expected = values[chosen.index(i)] if i in chosen else 0.0
        assert mask[i].sum() == r.length
        torch.testing.assert_close(advantages[i, : r.length], torch.full((r.length,), expected), atol=1e-5, rtol=1e-5)


@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), min_size=1, max_size=5))
def test_adaptive_k_equals_plain_python(history):
    method, seen = Gfpo(adaptive=[6, 5, 4, 3]), []
    for counts in history:
        rows = [row(g, 1 + n, 0.5 if n < c else -0.5) for g, c in enumerate(counts) for n in range(8)]
        counts_kept = method.keep_completions(make_batch(rows)).view(-1, 8).sum(1).tolist()
        seen += [c / 8 for c in counts]
        ordered = sorted(seen)
        quartiles = [ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75)]
        assert counts_kept == [
            [6, 5, 4, 3][sum(q < c / 8 or (q == c / 8 and c > 4) for q in quartiles)] for c in counts
        ]
    assert statistics.mean(seen) == pytest.approx(
        sum(a * n for a, n in method.state_dict()["seen"]) / sum(n for _, n in method.state_dict()["seen"])
    )


@pytest.mark.parametrize(
    "knobs,message",
    [
        ({"k": 1}, "k: 1 must be a whole number of at least 2"),
        ({"by": "size"}, "by: 'size' must be one of length, reward_per_token"),
        ({"adaptive": [4, 4]}, "adaptive: .* four numbers"),
        ({"adaptive": 3}, "adaptive: 3 must be four numbers"),
        ({"adaptive": [4, 4, 4, 1]}, "adaptive: 1 must be"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        Gfpo(**knobs)


def test_keeping_all_is_refused():
    assert not list(Gfpo(k=4).problems(8, 100))
    assert next(iter(Gfpo(k=8).problems(8, 100))).startswith("k: 8 of actor_rollout_ref.rollout.n=8")
    assert next(iter(Gfpo(adaptive=[8, 4, 4, 4]).problems(8, 100))).startswith("adaptive: 8 of")
    assert next(iter(Gfpo(k=3, adaptive=[4, 4, 3, 3]).problems(8, 100))).startswith("k: 3 has no effect with adaptive")
    assert not list(Gfpo(k=2, adaptive=[3, 3, 2, 2]).problems(4, 100))  # the recipe's k
