"""The variants whose advantage and loss are verl's alone, against a version in plain Python: is the wiring right?"""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.utils.config import omega_conf_to_dataclass

from iapo.advantage import grpo_advantage
from iapo.launch.compose import resolve
from tests.methods.batches import Row, grpo_naive, make_batch, row_lists

LONGEST = 256


@cache
def config_and_actor(name):
    config = resolve([f"variant={name}", "model=tiny", "platform=cpu", f"data.max_response_length={LONGEST}"])
    return config, omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def advantages_of(rows, by_std=True):
    return grpo_naive([row.group for row in rows], [row.reward for row in rows], by_std)


def clipped(advantage, ratio, low, high):
    """PPO's clipped objective, with the bound for large ratios of negative advantages that verl always has."""
    value = min(advantage * ratio, advantage * min(max(ratio, 1 - low), 1 + high))
    return max(value, 3 * advantage) if advantage < 0 else value


def grpo_loss(rows, ratios):
    """verl's default form of GRPO: every token of the batch counts the same."""
    return token_mean(rows, ratios, 0.2, 0.2)


def dapo_loss(rows, ratios):
    """Equation 8 of DAPO."""
    return token_mean(rows, ratios, 0.2, 0.28)


def token_mean(rows, ratios, low, high):
    pairs = zip(advantages_of(rows), ratios, strict=True)
    values = [clipped(advantage, ratio, low, high) for advantage, line in pairs for ratio in line]
    return -sum(values) / len(values)


def dr_grpo_loss(rows, ratios):
    """Section 3.2 of Dr. GRPO: sums over a completion's tokens, over the longest response, then over the batch."""
    total = 0.0
    for advantage, line in zip(advantages_of(rows, by_std=False), ratios, strict=True):
        total += sum(clipped(advantage, ratio, 0.2, 0.2) for ratio in line) / LONGEST
    return -total / len(rows)


def verl_loss(name, batch, log_ratios_BT, *parts):
    """The loss that verl's actor sums up over micro-batches, on one rank; as in verl.workers.utils.losses.ppo_loss."""
    config, actor = config_and_actor(name)
    actor.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=batch.response_mask.sum(),
        global_batch_size=len(batch.rewards),
        loss_scale_factor=actor.loss_scale_factor,
    )
    by_std = config.algorithm.norm_adv_by_std_in_grpo
    advantages = grpo_advantage(batch.rewards, batch.response_mask, batch.group, by_std)
    columns = (torch.zeros(log_ratios_BT.shape), log_ratios_BT, advantages, batch.response_mask)
    losses = (compute_policy_loss_vanilla(*(x[part] for x in columns), actor.loss_agg_mode, actor)[0] for part in parts)
    return sum(loss.item() for loss in losses)


@pytest.mark.parametrize(
    "name,expected",
    [
        # Advantages +-1/sqrt(2), or +-1 without the standard deviation. Ratios 1.25 and 1 of the good completion, 0.5
        # of the bad one, are clipped to 1.2 (1.25 where the upper bound is 1.28), 1 and 0.8.
        ("grpo", -(1.2 + 1 - 0.8) / 3 / math.sqrt(2)),
        ("dapo", -(1.25 + 1 - 0.8) / 3 / math.sqrt(2)),
        ("dr_grpo", -((1.2 + 1) / LONGEST - 0.8 / LONGEST) / 2),
    ],
)
def test_loss_by_hand(name, expected):
    good = Row(group=0, length=2, correct=True, reward=1.5, tokens=[1, 2], entropy=[0.0, 0.0])
    bad = Row(group=0, length=1, correct=False, reward=-0.5, tokens=[3], entropy=[0.0])
    log_ratios = torch.tensor([[1.25, 1.0], [0.5, 9.0]]).log()
    assert verl_loss(name, make_batch([good, bad]), log_ratios, slice(None)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name,naive", [("grpo", grpo_loss), ("dr_grpo", dr_grpo_loss), ("dapo", dapo_loss)])
@given(rows=row_lists, seed=st.integers(0, 10**6), extra=st.integers(0, 3), cut=st.integers(1, 23))
def test_advantage_and_loss_equal_plain_python_in_micro_batches_too(name, naive, rows, seed, extra, cut):
    batch = make_batch(rows, extra=extra)
    log_ratios = torch.randn(batch.response_mask.shape, generator=torch.Generator().manual_seed(seed))
    loss = verl_loss(name, batch, log_ratios, slice(0, cut), slice(cut, None))
    ratios = [[math.exp(x) for x in line[: row.length]] for line, row in zip(log_ratios.tolist(), rows, strict=True)]
    torch.testing.assert_close(loss, naive(rows, ratios), atol=1e-4, rtol=1e-4)


def test_only_grpo_is_tied_to_the_initial_policy():
    grpo, dr_grpo, dapo = (config_and_actor(name)[1] for name in ("grpo", "dr_grpo", "dapo"))
    assert (grpo.use_kl_loss, grpo.kl_loss_coef, grpo.kl_loss_type) == (True, 0.001, "low_var_kl")
    assert not dr_grpo.use_kl_loss and not dapo.use_kl_loss
