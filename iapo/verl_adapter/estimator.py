"""The advantage estimator `iapo` of verl's registry.

verl calls an estimator with rewards, mask, config and group index only. What the terms of `iapo.advantage` need
beyond that is bound around the call by the trainer, so that none of verl's code is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, register_adv_est

from iapo.advantage import iapo_advantage
from iapo.config import IapoConfig


@dataclass
class AdvantageInputs:
    """What one call of the estimator needs; shapes as in `iapo.advantage.iapo_advantage`."""

    config: IapoConfig
    exit_entropy: torch.Tensor | None = None
    region_mask: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    probe_tokens: int = 0
    # Filled by the estimator: the weighted terms, for the metrics.
    terms: dict[str, torch.Tensor] = field(default_factory=dict)


_inputs: ContextVar[AdvantageInputs] = ContextVar("iapo_advantage_inputs")


@contextmanager
def bind(inputs: AdvantageInputs) -> Iterator[AdvantageInputs]:
    """Hand `inputs` to the estimator calls inside the context."""
    token = _inputs.set(inputs)
    try:
        yield inputs
    finally:
        _inputs.reset(token)


@register_adv_est("iapo")
def compute_iapo_advantage(token_level_rewards, response_mask, index, config=None, **_):
    """verl's GRPO advantage plus the terms of `iapo.advantage`; with all weights 0 GRPO's, bit for bit.

    Args:
        token_level_rewards, response_mask: (B, T).
        index: (B,) group of each completion.
        config: verl's `algorithm` section; `norm_adv_by_std_in_grpo` is honoured.

    Returns:
        advantages and returns, the same tensor (B, T), as GRPO's.

    Raises:
        RuntimeError: outside of `bind`, that is with another trainer than iapo's.
    """
    inputs = _inputs.get(None)
    if inputs is None:
        raise RuntimeError(
            "algorithm.adv_estimator: 'iapo' needs trainer.v1.trainer_mode=iapo, which measures exit entropies; "
            "start the run with python -m iapo.train."
        )
    norm_by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    outcome, _ = compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=norm_by_std
    )
    region_mask = None if inputs.region_mask is None else inputs.region_mask * response_mask
    advantages, inputs.terms = iapo_advantage(
        outcome,
        response_mask,
        inputs.config,
        index=index,
        exit_entropy=inputs.exit_entropy,
        region_mask=region_mask,
        old_log_probs=inputs.old_log_probs,
        correct=inputs.correct,
    )
    return advantages, advantages
