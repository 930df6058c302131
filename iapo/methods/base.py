"""Methods of token-efficient RL on one protocol: each is one file here, one YAML in recipes/variant and one test.

The advantages of a training step are made in stages. A method overrides those that it acts on; the rest is GRPO:

    shape_reward         (B,)      the outcome rewards, reshaped
    keep_completions     (B,)      the completions that train; what follows sees no others
    outcome_advantage    (B, T)    the group-relative advantage; the terms of `iapo.advantage` are added to it
    token_weight         (B, T)    factors >= 0 of each token's advantage
    loss_mask            (B, T)    the tokens that the loss is a mean over

docs/adding-a-method.md walks through an example. Shape suffixes as in `iapo.information`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch

HOOKS = ("shape_reward", "keep_completions", "outcome_advantage", "token_weight", "loss_mask")
# The fields of a `Batch` that a method gets if it needs them.
OPTIONAL = ("correct", "tokens", "entropy")
# Several methods may weigh and mask the same tokens; two rewards, selections or advantages would undo each other.
ONE_METHOD_ONLY = ("shape_reward", "keep_completions", "outcome_advantage")
STATES_FILE = "methods.json"


@dataclass(frozen=True)
class Batch:
    """The completions of a training step, all of them with at least one token.

    Attributes:
        group: (B,) number of the prompt that a completion answers.
        rewards: (B,) outcome rewards.
        response_mask: (B, T).
        step: of training, from 1.
        correct: (B,) bool, the answer is right. None, like what follows, unless a method `needs` it.
        tokens: (B, T) response token ids.
        entropy: (B, T) next-token entropies of the old policy where each token was drawn, in nats.
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
        """(B,) response tokens, as float32."""
        return self.response_mask.sum(1).float()

    def groups(self) -> list[torch.Tensor]:
        """The row numbers of each group."""
        return [(self.group == g).nonzero().flatten() for g in self.group.unique().tolist()]

    def rows(self, chosen: torch.Tensor) -> "Batch":
        """The batch of the `chosen` (B,) rows alone."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[chosen] for k, v in own.items() if isinstance(v, torch.Tensor)})


class Method:
    """A method: a dataclass of its knobs with the hooks that it acts by.

    Attributes:
        needs: those of `OPTIONAL` that it reads.
        ignores: hooks of other methods, or the `overlong` penalty, that would have no effect beside this one, and why.
    """

    needs: ClassVar[Sequence[str]] = ()
    ignores: ClassVar[dict[str, str]] = {}

    def problems(self, rollouts: int, max_response_length: int) -> Iterator[str]:
        """What is wrong with the knobs in a run with so many rollouts per prompt: "knob: value, fix"."""
        return iter(())

    def shape_reward(self, batch: Batch) -> torch.Tensor:
        """(B,) rewards instead of `batch.rewards`."""
        return batch.rewards

    def keep_completions(self, batch: Batch) -> torch.Tensor:
        """(B,) bool: the completions that train."""
        return torch.ones(len(batch.group), dtype=torch.bool)

    def outcome_advantage(self, batch: Batch) -> torch.Tensor:
        """(B, T) advantages instead of GRPO's."""
        raise NotImplementedError

    def token_weight(self, batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
        """(B, T) factors >= 0. The clipped loss of a token is proportional to its advantage, so they weigh the loss."""
        return torch.ones_like(advantages)

    def loss_mask(self, batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
        """(B, T): tokens outside have no loss, of whatever kind, and don't count in its mean.

        verl skips a mini-batch in which no token is left; its loss is NaN among the metrics.
        """
        return batch.response_mask

    def state_dict(self) -> dict:
        """What it learned in training so far; plain numbers and lists, saved with every checkpoint."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`."""


def acts_by(method: Method) -> list[str]:
    """The hooks that a method overrides."""
    return [hook for hook in HOOKS if getattr(type(method), hook) is not getattr(Method, hook)]


def select(methods: Sequence[Method], batch: Batch) -> tuple[Batch, torch.Tensor]:
    """The completions that train, with their final rewards, and (B,) bool which of the batch they are."""
    for method in methods:
        batch = replace(batch, rewards=method.shape_reward(batch))
    kept_B = torch.ones(len(batch.group), dtype=torch.bool)
    for method in methods:
        kept_B &= method.keep_completions(batch)
    return batch.rows(kept_B), kept_B


def weigh(methods: Sequence[Method], batch: Batch, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The final advantages and loss mask, each (B, T), from the advantages of a batch.

    If no token at all is left the mask stays the response's and the advantages are 0: a mean over nothing is NaN.
    """
    weight_BT, mask_BT = batch.response_mask.float(), batch.response_mask.bool()
    for method in methods:
        weight_BT = weight_BT * method.token_weight(batch, advantages)
        mask_BT = mask_BT & method.loss_mask(batch, advantages).bool()
    if not mask_BT.any():
        return torch.zeros_like(advantages), batch.response_mask
    return advantages * weight_BT * mask_BT, mask_BT.to(batch.response_mask.dtype)


def make_methods(sections: dict[str, dict]) -> dict[str, Method]:
    """The methods of the `methods` section of a configuration: their class, in `_target_`, called with their knobs.

    Raises:
        ValueError: naming the field, its value and the fix.
    """
    from hydra.utils import get_class

    methods = {}
    if not isinstance(sections, dict):
        raise ValueError(f"methods: {sections!r} must be a mapping of names to sections; leave it to variant=....")
    for name, section in sections.items():
        if not isinstance(section, dict) or not section.get("_target_"):
            raise ValueError(f"methods.{name}: {section!r} lacks _target_, the class; choose it by variant={name}.")
        knobs = dict(section)
        target = knobs.pop("_target_")
        try:
            methods[name] = get_class(target)(**knobs)
            if not isinstance(methods[name], Method):
                raise TypeError("it is no iapo.methods.Method")
        except Exception as error:  # of whatever is imported
            if isinstance(error, ValueError) and str(error).partition(":")[0] in knobs:
                raise ValueError(f"methods.{name}.{error}") from None
            reason = " ".join(str(error).split())
            raise ValueError(f"methods.{name}: {target} can't be made of {knobs} ({reason}).") from None
        if unknown := set(methods[name].needs) - set(OPTIONAL):
            raise ValueError(f"methods.{name}: needs {', '.join(unknown)}, but there are {', '.join(OPTIONAL)} only.")
    return methods


def save_states(methods: dict[str, Method], folder: Path) -> None:
    """Write what the methods learned beside a checkpoint."""
    (folder / STATES_FILE).write_text(json.dumps({name: method.state_dict() for name, method in methods.items()}))


def load_states(methods: dict[str, Method], folder: Path) -> None:
    """Let the methods go on from a checkpoint.

    Raises:
        ValueError: it holds no state of one of them.
    """
    path = folder / STATES_FILE
    states = json.loads(path.read_text()) if path.is_file() else {}
    for name, method in methods.items():
        if name not in states:
            raise ValueError(f"methods.{name}: {path} says nothing of it; choose a checkpoint of this variant.")
        method.load_state_dict(states[name])


def conflicts(methods: dict[str, Method]) -> Iterator[str]:
    """Why these methods can't act together; nothing if they can."""
    for hook in ONE_METHOD_ONLY:
        names = [name for name, method in methods.items() if hook in acts_by(method)]
        if len(names) > 1:
            yield f"methods: only one method of a run may have its own {hook}, not {' and '.join(names)}; choose one."
    for name, method in methods.items():
        for other in methods:
            for hook in set(acts_by(methods[other])) & set(method.ignores):
                if other != name:
                    yield f"methods: the {hook} of {other} has no effect beside {name}: {method.ignores[hook]}."


def number(name: str, value, low: float = 0, high: float = float("inf"), whole: bool = False) -> None:
    """Check a knob.

    Raises:
        ValueError: unless it is a number in [low, high], a whole one if asked for.
    """
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or abs(value) == float("inf"):
        span = f" of at least {low}" if high == float("inf") else f" from {low} to {high}"
        span = "" if low == -float("inf") else span
        raise ValueError(f"{name}: {value!r} must be a {'whole ' if whole else ''}number{span}.")


def choice(name: str, value, choices: Sequence[str]) -> None:
    """Check a knob.

    Raises:
        ValueError: unless it is one of `choices`.
    """
    if value not in choices:
        raise ValueError(f"{name}: {value!r} must be one of {', '.join(choices)}.")
