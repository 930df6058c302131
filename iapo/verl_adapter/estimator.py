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
from iapo.methods import OPTIONAL, Batch, Method, acts_by, select, weigh


@dataclass
class AdvantageInputs:
    """What one call of the estimator needs; shapes as in `iapo.advantage.iapo_advantage` and `iapo.methods.Batch`."""

    config: IapoConfig
    methods: dict[str, Method] = field(default_factory=dict)
    step: int = 1
    exit_entropy: torch.Tensor | None = None
    region_mask: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    probe_tokens: int = 0
    # Filled by the estimator: the weighted terms for the metrics, and (B, T) what the loss is over.
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    loss_mask: torch.Tensor | None = None


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
    """verl's GRPO advantage, the terms of `iapo.advantage`, and what the methods of `iapo.methods` make of them.

    With all weights 0 and no methods GRPO's, bit for bit.

    Args:
        token_level_rewards, response_mask: (B, T).
        index: (B,) group of each completion.
        config: verl's `algorithm` section; `norm_adv_by_std_in_grpo` is honoured.

    Returns:
        advantages and returns, equal, (B, T), as GRPO's.

    Raises:
        RuntimeError: outside of `bind`, that is with another trainer than iapo's.
    """
    inputs = _inputs.get(None)
    if inputs is None:
        raise RuntimeError(
            "algorithm.adv_estimator: 'iapo' needs trainer.v1.trainer_mode=iapo, which measures exit entropies; "
            "start the run with python -m iapo.train."
        )
    methods = list(inputs.methods.values())
    numbers = {uid: number for number, uid in enumerate(dict.fromkeys(index))}
    everything = Batch(
        group=torch.tensor([numbers[uid] for uid in index]),
        rewards=token_level_rewards.sum(-1),
        response_mask=response_mask,
        step=inputs.step,
        **{name: getattr(inputs, name) for name in OPTIONAL},
    )
    # Rows without a token are verl's padding, a group of their own, which methods need not know.
    real_B = response_mask.bool().any(1) if methods else torch.ones(len(everything.group), dtype=torch.bool)
    batch, kept = select(methods, everything.rows(real_B))
    rows = real_B.nonzero().flatten()[kept]
    own_outcome = next((method.outcome_advantage for method in methods if "outcome_advantage" in acts_by(method)), None)
    by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    outcome = own_outcome(batch) if own_outcome else grpo(batch, by_std)

    def of_rows(x):
        return None if x is None else x[rows]

    region_mask = None if inputs.region_mask is None else inputs.region_mask * response_mask
    advantages, terms = iapo_advantage(
        outcome,
        batch.response_mask,
        inputs.config,
        index=batch.group.tolist(),
        exit_entropy=of_rows(inputs.exit_entropy),
        region_mask=of_rows(region_mask),
        old_log_probs=of_rows(inputs.old_log_probs),
        correct=of_rows(inputs.correct),
    )
    advantages, loss_mask = weigh(methods, batch, advantages)

    def in_place(x):
        return x.new_zeros(response_mask.shape).index_copy(0, rows, x)

    inputs.terms = {name: in_place(term) for name, term in terms.items()}
    inputs.loss_mask = in_place(loss_mask)
    return in_place(advantages), in_place(advantages)


def grpo(batch: Batch, by_std: bool) -> torch.Tensor:
    """(B, T) verl's group-normalised outcome advantage."""
    rewards_BT = torch.zeros(batch.response_mask.shape, dtype=batch.rewards.dtype)
    rewards_BT[:, 0] = batch.rewards  # verl sums over the tokens
    group = batch.group.numpy()
    return compute_grpo_outcome_advantage(rewards_BT, batch.response_mask, group, norm_adv_by_std_in_grpo=by_std)[0]
