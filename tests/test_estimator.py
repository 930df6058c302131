"""The estimator inside verl's own advantage computation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensordict import TensorDict

from iapo.config import IapoConfig
from iapo.methods.gfpo import Gfpo
from iapo.step import StepInputs


@pytest.fixture(scope="module")
def verl_v1():
    pytest.importorskip("transfer_queue")
    from verl.protocol import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    from iapo.verl_adapter import estimator

    return DataProto, compute_advantage_for_multi_trajectories, estimator


def batch(DataProto, B=12, T=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B, 1), generator=generator)
    lengths[-1] = 0  # a padding row of verl's balancing
    mask = (torch.arange(T) < lengths).long()
    rewards = torch.zeros(B, T)
    for i in range(B - 1):
        rewards[i, lengths[i, 0] - 1] = [-1.5, -0.5, 0.5, 1.5][i % 4 if i < 8 else 0]  # the last group: no variance
    uids = np.array([f"u{i // 4}" for i in range(B - 1)] + ["pad"], dtype=object)
    keys = [f"{uid}_{i}_0" for i, uid in enumerate(uids)]
    data = DataProto(
        batch=TensorDict({"token_level_rewards": rewards, "response_mask": mask}, batch_size=B),
        non_tensor_batch={"uid": uids},
    )
    return data, keys


@pytest.mark.parametrize("by_std", [True, False])
def test_zero_weights_equal_grpo_bit_for_bit(verl_v1, by_std):
    DataProto, compute, estimator = verl_v1
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": by_std})
    results = []
    for name in ("grpo", "iapo"):
        data, keys = batch(DataProto)
        data.batch["response_mask"][1] = 0  # no padding: verl's rejection sampling took all its tokens
        with estimator.bind(StepInputs(IapoConfig())):
            result = compute(data, keys, name, norm_adv_by_std_in_grpo=by_std, config=config)
        results.append(result.batch)
    assert results[0]["advantages"].abs().sum() > 0
    assert torch.equal(results[0]["advantages"], results[1]["advantages"])
    assert torch.equal(results[0]["returns"], results[1]["returns"])


@pytest.mark.parametrize("by_std,scale", [(True, 2**0.5), (False, 1.0)])  # grpo, dr_grpo
def test_the_outcome_by_hand(verl_v1, by_std, scale):
    _, _, estimator = verl_v1
    rewards = torch.tensor([[0.0, 1.5], [-0.5, 0.0], [0.5, 0.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 0]])
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": by_std})
    with estimator.bind(StepInputs(IapoConfig())):
        advantages, _ = estimator.compute_iapo_advantage(rewards, mask, ["a", "a", "alone"], config)
    # 1 above and below their mean; one is alone because other rollouts failed.
    expected = torch.tensor([[1 / scale, 1 / scale], [-1 / scale, 0], [0, 0]])
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)


def test_terms_reach_the_advantage_and_padding_rows_get_none(verl_v1):
    DataProto, compute, estimator = verl_v1
    data, keys = batch(DataProto)
    mask = data.batch["response_mask"]
    B, T = mask.shape
    inputs = StepInputs(
        IapoConfig(alpha=0.3, rho=0.1),
        exit_entropy=torch.rand(B, T + 1, generator=torch.Generator().manual_seed(1)),
        region_mask=torch.ones(B, T),  # wider than the response: the estimator cuts it
        correct=torch.ones(B),
    )
    with estimator.bind(inputs) as carrier:
        advantages = compute(data, keys, "iapo", config=OmegaConf.create({})).batch["advantages"]
    assert list(carrier.result.terms) == ["outcome", "informativeness", "information_rate"]
    torch.testing.assert_close(advantages, sum(carrier.result.terms.values()))
    assert (advantages[mask == 0] == 0).all()
    # Zero-sum over each completion's tokens, and over each group's completions.
    torch.testing.assert_close(carrier.result.terms["informativeness"].sum(1), torch.zeros(B), atol=1e-5, rtol=0)
    rate_B = carrier.result.terms["information_rate"][:, 0]
    for uid in set(keys_uid := [key.split("_")[0] for key in keys]):
        rows = [i for i, other in enumerate(keys_uid) if other == uid]
        assert rate_B[rows].sum().abs() < 1e-6
    assert rate_B.abs().sum() > 0


def test_without_the_trainer_the_error_says_what_to_do(verl_v1):
    DataProto, compute, _ = verl_v1
    data, keys = batch(DataProto)
    with pytest.raises(RuntimeError, match=r"trainer\.v1\.trainer_mode=iapo"):
        compute(data, keys, "iapo", config=OmegaConf.create({}))


def test_methods_see_no_padding_and_what_they_drop_has_no_advantage(verl_v1):
    DataProto, compute, estimator = verl_v1
    data, keys = batch(DataProto)
    mask = data.batch["response_mask"]
    inputs = StepInputs(IapoConfig(), {"gfpo": Gfpo(k=2)}, correct=torch.ones(len(mask)) > 0)
    with estimator.bind(inputs) as carrier:
        advantages = compute(data, keys, "iapo", config=OmegaConf.create({})).batch["advantages"]
    lengths = mask.sum(1)
    kept = set()
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]):
        kept |= set(sorted(rows, key=lambda i: lengths[i])[:2])
    assert set(carrier.result.trains.nonzero().flatten().tolist()) == kept
    assert torch.equal(carrier.result.loss_mask, mask)
    assert not advantages[~carrier.result.trains].any() and not advantages[mask == 0].any() and advantages.any()
    torch.testing.assert_close(carrier.result.terms["outcome"], advantages)


@given(seed=st.integers(0, 10**6), k=st.integers(2, 4))
def test_the_information_rate_compares_the_kept_completions_alone(verl_v1, seed, k):
    DataProto, compute, estimator = verl_v1
    data, keys = batch(DataProto, seed=seed)
    mask, uids = data.batch["response_mask"], data.non_tensor_batch["uid"]
    generator = torch.Generator().manual_seed(seed)
    exit_entropy = torch.rand(len(mask), mask.shape[1] + 1, generator=generator)
    correct = torch.rand(len(mask), generator=generator) > 0.3
    config = IapoConfig(rho=0.7)
    inputs = StepInputs(config, {"gfpo": Gfpo(k=k)}, exit_entropy=exit_entropy, correct=correct)
    with estimator.bind(inputs) as carrier:
        advantages = compute(data, keys, "iapo", config=OmegaConf.create({})).batch["advantages"]
    rows = carrier.result.trains
    assert [rows[uids == uid].sum() for uid in ("u0", "u1", "u2", "pad")] == [k, k, min(k, 3), 0]
    kept = DataProto(batch=data.batch[rows], non_tensor_batch={"uid": uids[rows.numpy()]})
    alone = StepInputs(config, exit_entropy=exit_entropy[rows], correct=correct[rows])
    with estimator.bind(alone):
        expected = compute(
            kept, [key for key, row in zip(keys, rows, strict=True) if row], "iapo", config=OmegaConf.create({})
        )
    torch.testing.assert_close(advantages[rows], expected.batch["advantages"])
    assert not advantages[~rows].any()
