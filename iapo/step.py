"""One training step's advantages, from outcome rewards to what the loss is over. Pure torch, no verl.

    rewards -> select -> completions that train -> outcome advantage + terms of `iapo.advantage` -> weigh
            -> all completions, the others with an advantage of 0 -> mask_tokens -> result

The methods of `iapo.methods` act by `select`, `weigh` and `mask_tokens`, and one of them may have an outcome advantage
of its own.
`iapo.verl_adapter.estimator` carries the result to verl. Shape suffixes as in `iapo.information`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from iapo.advantage import grpo_advantage, iapo_advantage
from iapo.config import IapoConfig
from iapo.methods import OPTIONAL, Batch, Method, acts_by, mask_tokens, select, weigh
from iapo.methods.base import chosen_rows


@dataclass(frozen=True)
class StepInputs:
    """What the terms and methods of a step read, beyond rewards, mask and groups. None where none of them needs it.

    Attributes:
        config: weights of the terms.
        methods: by name.
        step: of training, from 1.
        divide_by_std: whether GRPO's advantage is divided by the standard deviation of its group (Dr. GRPO's isn't).
        exit_entropy: (B, T + 1) in nats.
        region_mask: (B, T) the tokens whose information was measured.
        old_log_probs: (B, T) of the sampled tokens under the policy that sampled them.
        correct: (B,) bool, the answer is right.
        tokens: (B, T) response token ids.
        entropy: (B, T) next-token entropies of the old policy, in nats.
    """

    config: IapoConfig
    methods: dict[str, Method] = field(default_factory=dict)
    step: int = 1
    divide_by_std: bool = True
    exit_entropy: torch.Tensor | None = None
    region_mask: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


@dataclass(frozen=True)
class StepAdvantage:
    """The result of `step_advantage`.

    Attributes:
        advantages: (B, T), 0 outside of `loss_mask` and of completions that don't train.
        loss_mask: (B, T) 1 on the tokens that the loss is a mean over.
        terms: (B, T) each weighted term by its name, before methods weigh or mask it.
        trains: (B,) bool, the completions that methods keep.
    """

    advantages: torch.Tensor
    loss_mask: torch.Tensor
    terms: dict[str, torch.Tensor]
    trains: torch.Tensor


def step_advantage(
    rewards: torch.Tensor, response_mask: torch.Tensor, group: Sequence[Hashable], inputs: StepInputs
) -> StepAdvantage:
    """The advantages of a step's completions, the tokens that train, and the terms that the advantages are made of.

    With all weights 0 and no methods this is GRPO, bit for bit verl's. Rows without a token are verl's padding. Methods
    never see them, and their result is 0.

    Args:
        rewards: (B,) outcome rewards.
        response_mask: (B, T).
        group: B values, equal for the completions of one prompt.
        inputs: what terms and methods need.

    Raises:
        ValueError: an input that a non-zero weight needs is missing.
    """
    methods = list(inputs.methods.values())
    everything = batch_of(rewards, response_mask, group, inputs)
    real_B = response_mask.bool().any(1) if methods else torch.ones(len(rewards), dtype=torch.bool)
    real = real_B.nonzero().flatten()
    batch, kept_B = select(methods, everything.rows(real_B))
    rows, kept = real[kept_B], batch.rows(kept_B)
    outcome = outcome_advantage(methods, kept, inputs.divide_by_std)
    advantages, terms = add_terms(outcome, kept, chosen_rows(inputs, rows))
    advantages = in_rows(weigh(methods, kept, advantages), kept_B.nonzero().flatten(), len(real))
    advantages, loss_mask = mask_tokens(methods, batch, advantages)
    count = len(rewards)
    return StepAdvantage(
        in_rows(advantages, real, count),
        in_rows(loss_mask, real, count),
        {name: in_rows(term, rows, count) for name, term in terms.items()},
        torch.zeros(count, dtype=torch.bool).index_fill(0, rows, True),
    )


def batch_of(
    rewards: torch.Tensor, response_mask: torch.Tensor, group: Sequence[Hashable], inputs: StepInputs
) -> Batch:
    """What the methods see: groups are numbered in the order in which they appear."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(group))}
    return Batch(
        group=torch.tensor([numbers[name] for name in group]),
        rewards=rewards,
        response_mask=response_mask,
        step=inputs.step,
        **{name: getattr(inputs, name) for name in OPTIONAL},
    )


def outcome_advantage(methods: Sequence[Method], batch: Batch, divide_by_std: bool) -> torch.Tensor:
    """(B, T) the outcome advantage of the method that has one of its own, else GRPO's."""
    for method in methods:
        if "outcome_advantage" in acts_by(method):
            return method.outcome_advantage(batch)
    return grpo_advantage(batch.rewards, batch.response_mask, batch.group, divide_by_std)


def add_terms(outcome: torch.Tensor, batch: Batch, inputs: StepInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`iapo.advantage.iapo_advantage` of a batch and the inputs of its rows; regions end with their responses."""
    return iapo_advantage(
        outcome,
        batch.response_mask,
        inputs.config,
        index=batch.group.tolist(),
        exit_entropy=inputs.exit_entropy,
        region_mask=None if inputs.region_mask is None else inputs.region_mask * batch.response_mask,
        old_log_probs=inputs.old_log_probs,
        correct=inputs.correct,
    )


def in_rows(x: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """(count, T) with x (len(rows), T) in these rows and 0 in the others."""
    return x.new_zeros(count, x.shape[1]).index_copy(0, rows, x)
