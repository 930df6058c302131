import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.advantage import (
    advantage_shares,
    exploration,
    grpo_advantage,
    iapo_advantage,
    informativeness,
    masked_zscore,
    relative_information_rate,
)
from iapo.config import IapoConfig


def test_masked_zscore_by_hand():
    z = masked_zscore(torch.tensor([[1.0, 0, 0, 0]]), torch.ones(1, 4))
    # mean 1/4, population std sqrt(3)/4
    torch.testing.assert_close(z, torch.tensor([[3.0, -1, -1, -1]]) / math.sqrt(3))
    masked = masked_zscore(torch.tensor([[2.0, 4.0, float("nan"), 99.0]]), torch.tensor([[1, 1, 0, 0]]))
    assert masked.tolist() == [[-1, 1, 0, 0]]


@pytest.mark.parametrize(
    "values,mask",
    [([0.1] * 7, [1] * 7), ([5.0, 1.0], [1, 0]), ([5.0, 1.0], [0, 0]), ([1.0, 1.0 + 1e-7], [1, 1])],
    ids=["equal", "one-valid", "none-valid", "rounding-noise"],
)
def test_masked_zscore_without_variance_is_zero(values, mask):
    assert masked_zscore(torch.tensor(values), torch.tensor(mask)).tolist() == [0.0] * len(values)


@given(
    values=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20),
    padding=st.integers(0, 5),
    scale=st.floats(0.5, 4),
)
def test_masked_zscore_properties(values, padding, scale):
    x = torch.tensor(values + [7.0] * padding)
    mask = torch.tensor([1] * len(values) + [0] * padding)
    z = masked_zscore(x, mask)
    assert (z[len(values) :] == 0).all()
    std = x[: len(values)].double().std(unbiased=False)
    if std > 1e-2:
        assert z.sum().abs() < 1e-3
        assert z.square().sum() / len(values) == pytest.approx(1, abs=1e-3)
        torch.testing.assert_close(masked_zscore(x * scale + 3, mask), z, atol=1e-3, rtol=1e-3)


def test_informativeness_by_hand():
    h = torch.tensor([[3.0, 2.0, 2.0, 1.0, 1.0]])
    region = torch.tensor([[1, 1, 0, 0]])
    # gains 1, 0 in the region; the gain of token 3 is outside
    assert informativeness(h, region).tolist() == [[1, -1, 0, 0]]


def test_exploration_by_hand():
    log_probs = torch.tensor([[0.5, 1.0, 1.0], [0.5, 1.0, 0.3]]).log()
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    result = exploration(log_probs, torch.tensor([1, 0]), mask)
    # correct: the confident token gains; wrong: it loses
    assert result.tolist() == [[-1, 1, 0], [1, -1, 0]]


def test_relative_information_rate_by_hand():
    # rates 2/2 = 1, 2/4 = 0.5, 2/1 = 2 (wrong), a group with one correct, an empty completion
    h = torch.zeros(6, 5)
    h[:, 0] = 2.0
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    correct = torch.tensor([1, 1, 0, 1, 0, 1])
    for groups in (list("aaabbb"), torch.tensor([0, 0, 0, 1, 1, 1])):
        assert relative_information_rate(h, correct, mask, groups).tolist() == [1, -1, 0, 0, 0, 0]


def batch():
    h = torch.tensor([[3.0, 2.0, 2.0, 2.0], [3.0, 3.0, 2.0, 1.5]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    return dict(
        outcome=torch.tensor([[1.0, 1, 0], [-1, -1, -1]]),
        response_mask=mask,
        index=["g", "g"],
        exit_entropy=h,
        region_mask=mask,
        old_log_probs=torch.tensor([[0.5, 1.0, 1.0], [0.2, 0.4, 0.9]]).log(),
        correct=torch.tensor([1, 0]),
    )


def test_terms_add_up_with_their_weights():
    inputs = batch()
    advantages, terms = iapo_advantage(config=IapoConfig(alpha=0.5, beta=0.1, rho=2.0), **inputs)
    assert list(terms) == ["outcome", "informativeness", "exploration", "information_rate"]
    assert terms["informativeness"][0].tolist() == [0.5, -0.5, 0]
    torch.testing.assert_close(terms["exploration"][0], torch.tensor([-0.1, 0.1, 0]))
    assert terms["information_rate"].abs().max() == 0  # one correct completion: no comparison
    torch.testing.assert_close(advantages, sum(terms.values()))
    assert (advantages[inputs["response_mask"] == 0] == 0).all()


def test_an_index_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"^index: 1 entries must be 2, one for each completion.$"):
        iapo_advantage(config=IapoConfig(rho=2.0), **batch() | {"index": ["g"]})


def zscores(values):
    """Plain Python: (x - mean) / population standard deviation; 0 where there is none to speak of."""
    mean = sum(values) / len(values)
    std = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
    return [(x - mean) / std if std > 1e-6 else 0.0 for x in values]


@st.composite
def completions(draw):
    """(group, correct, region tokens, h_0..h_region, log-probs): the region is the head of the response."""
    length = draw(st.integers(1, 5))
    region = draw(st.integers(0, length))
    # A grid, so that equal values are frequent and standard deviations are 0 or well above rounding.
    h = [n / 4 for n in draw(st.lists(st.integers(0, 8), min_size=region + 1, max_size=region + 1))]
    log_probs = [-n / 2 for n in draw(st.lists(st.integers(0, 4), min_size=length, max_size=length))]
    return draw(st.integers(0, 2)), draw(st.booleans()), region, h, log_probs


@given(
    rows=st.lists(completions(), min_size=1, max_size=8),
    weights=st.tuples(*[st.sampled_from([0.0, 0.5, 3.0])] * 3),
    gate=st.sampled_from(["all", "correct"]),
    extra=st.integers(0, 3),
)
def test_equals_plain_python(rows, weights, gate, extra):
    alpha, beta, rho = weights
    B, T = len(rows), max(len(row[4]) for row in rows) + extra
    outcome, h_BT1, mask, region_mask = torch.zeros(B, T), torch.zeros(B, T + 1), torch.zeros(B, T), torch.zeros(B, T)
    log_probs_BT = torch.full((B, T), -0.7)  # rubbish on padding
    expected = torch.zeros(B, T)
    for i, (group, correct, region, h, log_probs) in enumerate(rows):
        length = len(log_probs)
        outcome[i, :length] = 1.0 if correct else -1.0
        h_BT1[i] = torch.tensor(h + [h[-1]] * (T - region))
        log_probs_BT[i, :length] = torch.tensor(log_probs)
        mask[i, :length] = 1
        region_mask[i, :region] = 1

        gains = zscores([h[t] - h[t + 1] for t in range(region)]) if region else []
        sign = 1 if correct else -1
        confidence = zscores([sign * math.exp(x) for x in log_probs])
        right = [max(row[3][0] - row[3][-1], 0) / len(row[4]) for row in rows if row[0] == group and row[1]]
        place = sum(row[0] == group and row[1] for row in rows[:i])
        rate = zscores(right)[place] if correct else 0.0
        for t in range(length):
            expected[i, t] = sign + beta * confidence[t] + rho * rate
            if t < region and (gate == "all" or correct):
                expected[i, t] += alpha * gains[t]

    advantages, _ = iapo_advantage(
        outcome,
        mask,
        IapoConfig(alpha=alpha, beta=beta, rho=rho, gate=gate),
        index=[row[0] for row in rows],
        exit_entropy=h_BT1,
        region_mask=region_mask,
        old_log_probs=log_probs_BT,
        correct=torch.tensor([row[1] for row in rows]),
    )
    torch.testing.assert_close(advantages, expected, atol=1e-4, rtol=1e-4)


def test_gate_correct_leaves_wrong_completions_out():
    _, terms = iapo_advantage(config=IapoConfig(alpha=1.0, gate="correct"), **batch())
    assert terms["informativeness"][0].tolist() == [1, -1, 0]
    assert terms["informativeness"][1].tolist() == [0, 0, 0]


def test_zero_weights_return_the_outcome_itself():
    inputs = batch()
    advantages, _ = iapo_advantage(config=IapoConfig(), **inputs)
    assert advantages is inputs["outcome"]


def test_padding_rows_get_nothing_and_change_nothing():
    inputs = batch()
    config = IapoConfig(alpha=0.5, beta=0.1, rho=0.3)
    expected, _ = iapo_advantage(config=config, **inputs)
    padded = {
        name: torch.cat([value, torch.zeros_like(value[:1])]) if isinstance(value, torch.Tensor) else [*value, "pad"]
        for name, value in inputs.items()
    }
    padded["correct"][-1] = 1  # verl copies its padding rows from a real one
    advantages, _ = iapo_advantage(config=config, **padded)
    assert torch.equal(advantages[:2], expected)
    assert (advantages[2] == 0).all()


def test_group_and_batch_order_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    B, T = 8, 6
    mask = (torch.arange(T) < torch.randint(0, T + 1, (B, 1), generator=generator)).long()
    inputs = dict(
        outcome=torch.randn(B, T, generator=generator) * mask,
        response_mask=mask,
        exit_entropy=torch.rand(B, T + 1, generator=generator),
        region_mask=mask,
        old_log_probs=-torch.rand(B, T, generator=generator),
        correct=torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]),
    )
    index = list("aaaabbbb")
    config = IapoConfig(alpha=0.5, beta=0.1, rho=0.3)
    expected, _ = iapo_advantage(config=config, index=index, **inputs)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    permuted, _ = iapo_advantage(
        config=config, index=[index[i] for i in order], **{k: v[order] for k, v in inputs.items()}
    )
    torch.testing.assert_close(permuted, expected[order])


@pytest.mark.parametrize(
    "weights,missing",
    [
        (dict(alpha=1.0), "exit_entropy"),
        (dict(alpha=1.0), "region_mask"),
        (dict(beta=1.0), "old_log_probs"),
        (dict(rho=1.0), "correct"),
        (dict(alpha=1.0, gate="correct"), "correct"),
    ],
)
def test_missing_inputs_are_named(weights, missing):
    with pytest.raises(ValueError, match=f"^{missing}: None"):
        iapo_advantage(config=IapoConfig(**weights), **(batch() | {missing: None}))


def test_advantage_shares_by_hand():
    mask = torch.tensor([[1, 1, 0]])
    terms = {"outcome": torch.tensor([[1.0, -1.0, 9.0]]), "exploration": torch.tensor([[0.5, 0.5, 9.0]])}
    assert advantage_shares(terms, mask) == {"outcome": pytest.approx(2 / 3), "exploration": pytest.approx(1 / 3)}
    assert advantage_shares({"outcome": torch.zeros(1, 3)}, mask) == {"outcome": 0.0}


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(alpha=-1), "iapo.alpha: -1"),
        (dict(beta="x"), "iapo.beta: 'x'"),
        (dict(rho=float("inf")), "iapo.rho: inf"),
        (dict(gate="none"), "iapo.gate: 'none' must be one of all, correct"),
        (dict(region="all"), "iapo.region"),
        (dict(stride=0), "iapo.stride: 0"),
        (dict(max_gap=1.5), "iapo.max_gap"),
        (dict(score="entropy"), "iapo.score: 'entropy' must be one of first_token_entropy, answer_logprob"),
        (dict(score="next_token_entropy", rho=1.0), "iapo.score: 'next_token_entropy' .* iapo.rho=1.0; set iapo.rho=0"),
        (dict(probe_at="newlines"), "iapo.probe_at: 'newlines' must be one of stride, boundaries"),
        (dict(probe_at="ends", alpha=0.5), "iapo.probe_at: 'ends' measures no token's gain, which iapo.alpha=0.5 need"),
        (dict(probe=""), "iapo.probe"),
        (dict(alfa=1.0), "iapo.alfa: unknown key; known are outcome, alpha"),
    ],
)
def test_config_errors_name_field_value_and_fix(change, message):
    with pytest.raises(ValueError, match=message):
        IapoConfig.from_mapping(change)


@given(
    groups=st.lists(st.integers(0, 4), min_size=1, max_size=20),
    seed=st.integers(0, 10**6),
    by_std=st.booleans(),
)
def test_grpo_is_verls_bit_for_bit(groups, seed, by_std):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(len(groups), generator=generator) * 3 - 1.5
    mask = (torch.arange(4) < torch.randint(0, 5, (len(groups), 1), generator=generator)).long()
    rewards_BT = torch.cat([rewards[:, None], torch.zeros(len(groups), 3)], 1)
    expected, _ = core_algos.compute_grpo_outcome_advantage(
        rewards_BT, mask, np.array(groups), norm_adv_by_std_in_grpo=by_std
    )
    alone = torch.tensor([groups.count(group) == 1 for group in groups])
    expected[alone] = 0  # verl's is the raw reward
    assert torch.equal(grpo_advantage(rewards, mask, torch.tensor(groups), by_std), expected)


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("reward", [0.1, 0.7, 100.1])
def test_grpo_gives_nothing_for_what_rounding_leaves_of_equal_rewards(reward, by_std):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    rewards, mask, group = torch.full((8,), reward), torch.ones(8, 2), torch.zeros(8, dtype=torch.long)
    rewards_BT = torch.cat([rewards[:, None], torch.zeros(8, 1)], 1)
    verls, _ = core_algos.compute_grpo_outcome_advantage(
        rewards_BT, mask, group.numpy(), norm_adv_by_std_in_grpo=by_std
    )
    assert (verls != 0).all() and len(verls.sign().unique()) == 1
    assert (grpo_advantage(rewards, mask, group, by_std) == 0).all()
    assert (masked_zscore(rewards, torch.ones(8)) == 0).all()
    rewards[0] += 3e-6 * max(1, reward)  # a difference beyond rounding counts
    assert (grpo_advantage(rewards, mask, group, by_std)[0] > 0).all()


def test_every_row_is_judged_by_its_own_valid_entries():
    values = torch.tensor([[100.1] * 7 + [5.0], [0.0, 3e-6, 0, 0, 0, 0, 0, 1e9]])
    mask = torch.ones(2, 8)
    mask[:, 7] = 0
    z = masked_zscore(values, mask)
    assert (z[0] == 0).all()  # equal, but for what is masked out
    assert (z[1, :7] != 0).all() and z[1, 7] == 0  # a spread of 3e-6 among small numbers counts


def test_grpo_gives_nothing_to_a_completion_alone():
    rewards, mask = torch.tensor([1.5, -1.5, 0.0]), torch.ones(3, 2)
    advantages = grpo_advantage(rewards, mask, torch.tensor([0, 1, 1]))
    assert (advantages[0] == 0).all() and (advantages[1:] != 0).all()


def test_shares_of_small_advantages_sum_to_one():
    terms = {"a": torch.tensor([[0.1, -0.1]]), "b": torch.tensor([[0.05, 0.15]])}
    assert advantage_shares(terms, torch.ones(1, 2)) == pytest.approx({"a": 0.5, "b": 0.5})


def test_negative_information_gives_no_rate():
    # Both lost two nats, the second over twice as many tokens: its rate is -0.5 nats per token, the other's -1.
    h = torch.tensor([[1.0, 2, 3, 3, 3], [1.0, 1, 2, 2, 3]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert relative_information_rate(h, torch.ones(2), mask, ["a", "a"]).tolist() == [0, 0]
    # Of one that gained and one that lost, the first is better, by one standard deviation.
    h[0, 2:] = 0.5
    torch.testing.assert_close(relative_information_rate(h, torch.ones(2), mask, ["a", "a"]), torch.tensor([1.0, -1]))
