"""The variants whose advantage and loss are verl's alone, against a version in plain Python: is the wiring right?"""

import math
import statistics
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.utils.config import omega_conf_to_dataclass

from iapo.train import resolve
from iapo.verl_adapter.estimator import grpo
from tests.methods.batches import make_batch, row_lists

LONGEST = 256


@cache
def config_and_actor(name):
    config = resolve([f"variant={name}", "model=tiny", "platform=cpu", f"data.max_response_length={LONGEST}"])
    return config, omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def group_advantages(rows, by_std):
    result = []
    for row in rows:
        rewards = [other.reward for other in rows if other.group == row.group]
        if len(rewards) == 1:  # where other rollouts failed
            result.append(row.reward)
        else:
            scale = statistics.stdev(rewards) + 1e-6 if by_std else 1
            result.append((row.reward - statistics.mean(rewards)) / scale)
    return result


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
    pairs = zip(group_advantages(rows, by_std=True), ratios, strict=True)
    values = [clipped(advantage, ratio, low, high) for advantage, line in pairs for ratio in line]
    return -sum(values) / len(values)


def dr_grpo_loss(rows, ratios):
    """Section 3.2 of Dr. GRPO: sums over a completion's tokens, over the longest response, then over the batch."""
    total = 0.0
    for advantage, line in zip(group_advantages(rows, by_std=False), ratios, strict=True):
        total += sum(clipped(advantage, ratio, 0.2, 0.2) for ratio in line) / LONGEST
    return -total / len(rows)


@pytest.mark.parametrize("name,naive", [("grpo", grpo_loss), ("dr_grpo", dr_grpo_loss), ("dapo", dapo_loss)])
@given(rows=row_lists, seed=st.integers(0, 10**6), extra=st.integers(0, 3), cut=st.integers(1, 23))
def test_advantage_and_loss_equal_plain_python_in_micro_batches_too(name, naive, rows, seed, extra, cut):
    (config, actor), batch = config_and_actor(name), make_batch(rows, extra=extra)
    mask = batch.response_mask
    log_ratios = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))
    actor.global_batch_info.update(  # as verl.workers.utils.losses.ppo_loss, on one rank
        dp_size=1,
        batch_num_tokens=mask.sum(),
        global_batch_size=len(rows),
        loss_scale_factor=actor.loss_scale_factor,
    )
    advantages = grpo(batch, config.algorithm.norm_adv_by_std_in_grpo)
    zeros, loss = torch.zeros(mask.shape), 0.0
    for part in (slice(0, cut), slice(cut, None)):
        tensors = (x[part] for x in (zeros, log_ratios, advantages, mask))
        loss += compute_policy_loss_vanilla(*tensors, actor.loss_agg_mode, actor)[0].item()
    ratios = [[math.exp(x) for x in line[: row.length]] for line, row in zip(log_ratios.tolist(), rows, strict=True)]
    torch.testing.assert_close(loss, naive(rows, ratios), atol=1e-4, rtol=1e-4)


def test_only_grpo_is_tied_to_the_initial_policy():
    grpo, dr_grpo, dapo = (config_and_actor(name)[1] for name in ("grpo", "dr_grpo", "dapo"))
    assert (grpo.use_kl_loss, grpo.kl_loss_coef, grpo.kl_loss_type) == (True, 0.001, "low_var_kl")
    assert not dr_grpo.use_kl_loss and not dapo.use_kl_loss
