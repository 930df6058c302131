"""What the trainer adds to verl's, without a cluster; the step itself is tested in test_end_to_end.py."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import PPOTrainerSync

from iapo.config import IapoConfig
from iapo.verl_adapter.trainer import MAX_REFILLS, NO_COMPLETION, IapoTrainer, pad_with_last


def test_dynamic_sampling_that_finds_no_mixed_group_stops_with_the_reason(monkeypatch):
    drawn = []
    monkeypatch.setattr(PPOTrainerSync, "_add_prompts_to_generate", lambda self, n: drawn.append(n) or n)
    trainer = object.__new__(IapoTrainer)
    trainer.config = OmegaConf.create({"data": {"train_batch_size": 4}})
    trainer.global_steps, trainer._refilled = 7, 0
    for _ in range(MAX_REFILLS * 2):
        assert trainer._add_prompts_to_generate(2) == 2
    with pytest.raises(RuntimeError, match="^algorithm.filter_groups: 400 extra prompts of step 7 .*enable=false"):
        trainer._add_prompts_to_generate(2)
    assert sum(drawn) == MAX_REFILLS * 4  # the refused ones were not drawn


@pytest.mark.parametrize(
    "verls,ours",
    [
        (NO_COMPLETION + " Enable it.", "^rollout: none of the 4 prompts of step 7 gave a completion; the first error"),
        ("something else", "^something else$"),
    ],
)
def test_a_step_whose_rollouts_all_failed_stops_with_the_reason(monkeypatch, verls, ours):
    def sample(**_):
        raise RuntimeError(verls)

    buffer = SimpleNamespace(sample=sample, poll_interval=1)
    monkeypatch.setattr(PPOTrainerSync, "_build_replay_buffer", lambda self: buffer)
    trainer = object.__new__(IapoTrainer)
    trainer.config = OmegaConf.create({"trainer": {"v1": {"sampler": {"sampler_kwargs": {}}}}})
    trainer.global_steps = 7
    with pytest.raises(RuntimeError, match=ours):
        trainer._build_replay_buffer().sample(global_steps=7, partition_id="train", batch_size=4)


@pytest.mark.parametrize(
    "weights,bypass,shares",
    [(dict(alpha=1.0), None, True), (dict(rho=1.0), False, True), (dict(alpha=1.0), True, False), ({}, None, False)],
)
def test_exit_entropies_come_with_old_log_probs_if_verl_computes_any(monkeypatch, weights, bypass, shares):
    requests = []

    def compute_old_log_prob(self, batch, metrics):
        requests.append(dict(batch.extra_info))
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_compute_old_log_prob", compute_old_log_prob)
    seconds = {"exit_entropy_seconds": torch.tensor([0.5, 2.0])}  # of two ranks, side by side
    monkeypatch.setattr(IapoTrainer, "_fetch", staticmethod(lambda batch, fields: {f: seconds[f] for f in fields}))
    trainer = object.__new__(IapoTrainer)
    correction = {} if bypass is None else {"rollout_correction": {"bypass_mode": bypass}}
    trainer.config = OmegaConf.create({"algorithm": {"adv_estimator": "iapo", **correction}})
    trainer.iapo, trainer.timing_raw = IapoConfig(share_log_prob_forward=True, **weights), {}
    batch = SimpleNamespace(extra_info={})
    assert trainer._compute_old_log_prob(batch, {}) is batch
    assert requests == ([{"iapo": asdict(trainer.iapo)}] if shares else [{}])
    assert batch.extra_info == {}  # reference log-probs may be the same worker's
    assert trainer.timing_raw == ({"exit_entropy": 2.0} if shares else {})
    trainer.iapo = IapoConfig(share_log_prob_forward=False, **weights)
    assert not trainer._shares_forward


def test_jagged_rows_go_on_with_their_last_value():
    rows = torch.nested.as_nested_tensor([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], layout=torch.jagged)
    assert pad_with_last(rows).tolist() == [[3.0, 1.0], [2.0, 2.0]]
