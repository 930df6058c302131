"""iapo.score=next_token_entropy, the paper's ablation: gains from the entropies that verl computes anyway."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from iapo.advantage import iapo_advantage
from iapo.config import IapoConfig
from iapo.information import information_gain, next_token_entropies
from iapo.metrics.training import information_metrics
from iapo.step import StepAdvantage, StepInputs
from iapo.verl_adapter.trainer import IapoTrainer

NE = IapoConfig(alpha=0.5, score="next_token_entropy")


def jagged(rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_gains_by_hand():
    # Two completions of three and of one token, the second padded with rubbish.
    entropy = torch.tensor([[2.0, 0.5, 1.0], [3.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    h = next_token_entropies(entropy, mask)
    assert h.tolist() == [[2.0, 0.5, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0]]
    # 2 nats before the first token, 0.5 after it. No token follows the last one, so it gains nothing.
    assert information_gain(h, mask).tolist() == [[1.5, -0.5, 0.0], [0.0, 0.0, 0.0]]


def test_a_region_that_ends_before_the_completion_has_its_last_gain():
    entropy, mask = torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([[1, 1, 1]])
    region = torch.tensor([[1, 1, 0]])  # the last token ends the completion
    assert information_gain(next_token_entropies(entropy, mask), region).tolist() == [[1.5, -0.5, 0.0]]
    # z-scores of 1.5 and -0.5 are 1 and -1.
    advantages, _ = iapo_advantage(
        torch.zeros(1, 3), mask, NE, index=[0], exit_entropy=next_token_entropies(entropy, mask), region_mask=region
    )
    assert advantages.tolist() == [[0.5, -0.5, 0.0]]


@given(
    st.lists(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 3)
)
def test_equals_plain_python(rows, extra):
    T = max(map(len, rows)) + extra
    entropy = torch.tensor([row + [7.0] * (T - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    gains = information_gain(next_token_entropies(entropy, mask), mask)
    for i, row in enumerate(rows):
        expected = [row[t] - row[min(t + 1, len(row) - 1)] for t in range(len(row))] + [0.0] * (T - len(row))
        assert gains[i].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_row_without_tokens_gains_nothing():
    h = next_token_entropies(torch.tensor([[7.0, 8.0]]), torch.tensor([[0, 0]]))
    assert h.tolist() == [[7.0, 7.0, 7.0]]


LETTERS = {1: "a", 2: "b", 3: "</think>", 4: "c", 5: "<eos>"}


@pytest.mark.parametrize("region,lengths", [("reasoning", [2, 3, 0]), ("response", [4, 3, 0])])
def test_the_trainer_takes_them_from_verl_without_a_pass(region, lengths):
    rows = {
        "responses": jagged([[1, 2, 3, 4, 5], [1, 2, 1], [1, 1]]),  # ended, cut, verl's padding
        "response_mask": jagged([[1, 1, 1, 1, 1], [1, 1, 1], [0, 0]]),
        "entropy": jagged([[2.0, 0.5, 1.0, 0.2, 0.1], [0.3, 0.2, 0.1], [7.0, 7.0]]),
    }
    trainer = object.__new__(IapoTrainer)
    trainer.iapo = IapoConfig(alpha=0.5, score="next_token_entropy", region=region)
    trainer.methods, trainer.global_steps, trainer.config = {}, 3, OmegaConf.create({})
    trainer.tokenizer = SimpleNamespace(
        eos_token_id=5, decode=lambda ids, **_: "".join(LETTERS[int(token)] for token in ids)
    )
    assert trainer.advantage_fields == ["entropy", "response_mask", "responses"]
    inputs = trainer.step_inputs(rows)
    assert inputs.region_mask.sum(1).tolist() == lengths
    expected = [[2.0, 0.5, 1.0, 0.2, 0.1, 0.1], [0.3, 0.2, 0.1, 0.1, 0.1, 0.1], [7.0] * 6]
    torch.testing.assert_close(inputs.exit_entropy, torch.tensor(expected))


def test_metrics_have_gains_but_no_exit_entropies():
    mask = torch.tensor([[1, 1, 1]])
    inputs = StepInputs(NE, exit_entropy=torch.tensor([[2.0, 0.5, 1.0, 1.0]]), region_mask=mask)
    result = StepAdvantage(torch.ones(1, 3), mask, {"outcome": torch.ones(1, 3)}, torch.tensor([True]))
    metrics = information_metrics(inputs, result, mask)
    assert metrics == {
        "iapo/advantage_share/outcome": 1.0,
        "iapo/information_gain/mean": pytest.approx(1 / 3),
        "iapo/information_gain/std": pytest.approx((2.5 / 3 - 1 / 9) ** 0.5),
    }
    inputs = replace(inputs, config=IapoConfig(alpha=0.5))
    assert information_metrics(inputs, result, mask)["iapo/exit_entropy/start"] == 2.0
    # Of the ends alone there are no gains.
    found = information_metrics(replace(inputs, config=IapoConfig(rho=1.0)), result, mask)
    assert found["iapo/information_rate"] == pytest.approx(1 / 3)
    assert "iapo/information_gain/mean" not in found and "iapo/information_gain/std" not in found


def test_no_probe_pass_is_needed():
    assert NE.needs_next_token_entropy and not NE.needs_exit_entropy
    assert not IapoConfig(score="next_token_entropy").needs_next_token_entropy
    assert IapoConfig(alpha=0.5).needs_exit_entropy and not IapoConfig(alpha=0.5).needs_next_token_entropy
