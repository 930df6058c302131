"""The protocol of a method: one file here, one YAML in recipes/variant and one test.

A training step makes its advantages in stages. A method overrides the stages that it acts by, its hooks. Without a
method every stage is GRPO's:

    shape_reward         (B,)      the outcome rewards
    keep_completions     (B,)      which completions train; the next two stages see only these
    outcome_advantage    (B, T)    the group-relative advantage, to which the terms of `iapo.advantage` are added
    token_weight         (B, T)    factors >= 0 of each token's advantage
    loss_mask            (B, T)    the tokens that the loss is a mean over, of all completions

`iapo.methods.combine` makes the methods of a run and applies them. docs/adding-a-method.md has a worked example.
Shape suffixes as in `iapo.information`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

HOOKS = ("shape_reward", "keep_completions", "outcome_advantage", "token_weight", "loss_mask")
# The fields of a `Batch` that are filled only if a method needs them.
OPTIONAL = ("correct", "tokens", "entropy")

Columns = TypeVar("Columns", bound="DataclassInstance")  # a dataclass, some of whose fields are tensors (B, ...)


@dataclass(frozen=True)
class Batch:
    """The completions of one training step. Each has at least one token; padding rows are left out.

    Attributes:
        group: (B,) the number of the prompt that a completion answers.
        rewards: (B,) outcome rewards.
        response_mask: (B, T) 1 on response tokens, which are right-padded.
        step: the training step, from 1.
        correct: (B,) bool, whether the answer is right. None unless a method `needs` it.
        tokens: (B, T) response token ids. None unless a method `needs` them.
        entropy: (B, T) next-token entropy of the old policy where each token was drawn, in nats. None unless a method
            `needs` it.
    """

    group: torch.Tensor
    rewards: torch.Tensor
    response_mask: torch.Tensor
    step: int = 1
    correct: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) number of response tokens, as float32."""
        return self.response_mask.sum(1).float()

    def groups(self) -> list[torch.Tensor]:
        """The row numbers of each group."""
        return [(self.group == g).nonzero().flatten() for g in self.group.unique().tolist()]

    def needed(self, name: str) -> torch.Tensor:
        """The field of `OPTIONAL` with this name.

        Raises:
            ValueError: it isn't filled, because no method lists it in `needs`.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name}: None; the method that reads it must list it in `needs`.")
        return value

    def rows(self, chosen: torch.Tensor) -> "Batch":
        """The batch of the `chosen` rows alone, given as (B,) bool or as row numbers."""
        return chosen_rows(self, chosen)


class Method:
    """A method: a dataclass whose fields are its knobs and whose overridden hooks are what it does.

    Attributes:
        needs: the fields of `OPTIONAL` that it reads.
        ignores: what does not go with this method, and why. A key is a hook of other methods, "overlong", the overlong
            penalty, or "filter_groups", dynamic sampling. `variant=dapo` has the last two.
        masks_last: whether its `loss_mask` ranks tokens, so that it comes after those of the other methods.
    """

    needs: ClassVar[Sequence[str]] = ()
    ignores: ClassVar[dict[str, str]] = {}
    masks_last: ClassVar[bool] = False

    def problems(self, rollouts: int, max_response_length: int) -> Iterator[str]:
        """What is wrong with the knobs in this run, one line each: "knob: value; fix".

        Args:
            rollouts: completions per prompt.
            max_response_length: in tokens.
        """
        return iter(())

    def shape_reward(self, batch: Batch) -> torch.Tensor:
        """(B,) rewards that replace `batch.rewards`."""
        return batch.rewards

    def keep_completions(self, batch: Batch) -> torch.Tensor:
        """(B,) bool, the completions that train. The others have an advantage of 0. They keep their KL loss and are
        counted in the mean of the loss."""
        return torch.ones(len(batch.group), dtype=torch.bool)

    def outcome_advantage(self, batch: Batch) -> torch.Tensor:
        """(B, T) advantages that replace GRPO's."""
        raise NotImplementedError

    def token_weight(self, batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
        """(B, T) factors >= 0. The clipped loss of a token is proportional to its advantage, so they weigh the loss."""
        return torch.ones_like(advantages)

    def loss_mask(self, batch: Batch, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) 1 on the tokens that have a loss. The others have none of any kind and are not counted in its mean.

        `mask` is (B, T) bool, the tokens that the methods before this one leave; it need not be applied here.

        verl skips a mini-batch in which no token is left, and reports its loss as NaN.
        """
        return batch.response_mask

    def state_dict(self) -> dict:
        """What the method learned so far, as plain numbers and lists. It is saved with every checkpoint."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Resume from a `state_dict`."""


def chosen_rows(columns: Columns, chosen: torch.Tensor) -> Columns:
    """The dataclass with these rows alone of each of its tensors (B, ...), given as (B,) bool or as row numbers."""
    own = {f.name: getattr(columns, f.name) for f in fields(columns)}
    rows: dict[str, Any] = {name: value[chosen] for name, value in own.items() if isinstance(value, torch.Tensor)}
    return replace(columns, **rows)


def acts_by(method: Method) -> list[str]:
    """The hooks that a method overrides."""
    return [hook for hook in HOOKS if getattr(type(method), hook) is not getattr(Method, hook)]


def check_number(name: str, value: Any, low: float = 0, high: float = math.inf, whole: bool = False) -> None:
    """Check that a knob is a finite number in [low, high], and a whole one if asked for.

    Raises:
        ValueError: if it isn't.
    """
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or abs(value) == math.inf:
        span = f" of at least {low}" if high == math.inf else f" from {low} to {high}"
        span = "" if low == -math.inf else span
        raise ValueError(f"{name}: {value!r} must be a {'whole ' if whole else ''}number{span}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that a knob is one of `choices`.

    Raises:
        ValueError: if it isn't.
    """
    if value not in choices:
        raise ValueError(f"{name}: {value!r} must be one of {', '.join(choices)}.")
