"""What the trainer adds to verl's, without a cluster; the step itself is tested in test_end_to_end.py."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import PPOTrainerSync

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


def test_jagged_rows_go_on_with_their_last_value():
    rows = torch.nested.as_nested_tensor([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], layout=torch.jagged)
    assert pad_with_last(rows).tolist() == [[3.0, 1.0], [2.0, 2.0]]
