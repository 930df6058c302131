"""The methods of one run: made from its configuration, checked against each other, applied, saved and loaded."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from iapo.methods.base import OPTIONAL, Batch, Method, acts_by

# Several methods may weigh and mask the same tokens. Two rewards, selections or advantages would undo each other.
ONE_METHOD_ONLY = ("shape_reward", "keep_completions", "outcome_advantage")
STATES_FILE = "methods.json"


def make_methods(sections: dict[str, dict]) -> dict[str, Method]:
    """The methods of a configuration's `methods` section, by name. `_target_` is the class; all else are its knobs.

    Raises:
        ValueError: a section that makes no method. The message names the field, its value and the fix.
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
        except Exception as error:  # whatever the imported code raises
            if isinstance(error, ValueError) and str(error).partition(":")[0] in knobs:
                raise ValueError(f"methods.{name}.{error}") from None
            reason = " ".join(str(error).split())
            raise ValueError(
                f"methods.{name}: {target} can't be made of {knobs} ({reason}); correct the class or its knobs."
            ) from None
        if unknown := set(methods[name].needs) - set(OPTIONAL):
            what = f"{', '.join(sorted(unknown))}, which no batch has"
            raise ValueError(f"methods.{name}: its class needs {what}; choose from {', '.join(OPTIONAL)}.")
    return methods


def conflicts(methods: dict[str, Method]) -> Iterator[str]:
    """Why these methods can't act together, one line each; nothing if they can."""
    for hook in ONE_METHOD_ONLY:
        names = [name for name, method in methods.items() if hook in acts_by(method)]
        if len(names) > 1:
            yield f"methods: {' and '.join(names)} have their own {hook}, but only one method of a run may; choose one."
    for name, method in methods.items():
        for other in methods:
            for hook in set(acts_by(methods[other])) & set(method.ignores):
                if other != name:
                    yield f"methods: the {hook} of {other} has no effect with {name}: {method.ignores[hook]}; drop one."


def select(methods: Sequence[Method], batch: Batch) -> tuple[Batch, torch.Tensor]:
    """The batch with its final rewards, and which of its completions train, as (B,) bool."""
    for method in methods:
        batch = replace(batch, rewards=method.shape_reward(batch))
    kept_B = torch.ones(len(batch.group), dtype=torch.bool)
    for method in methods:
        kept_B &= method.keep_completions(batch)
    return batch, kept_B


def weigh(methods: Sequence[Method], batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
    """(B, T) the advantages of the completions that train, times the methods' weights."""
    weight_BT = batch.response_mask.float()
    for method in methods:
        weight_BT = weight_BT * method.token_weight(batch, advantages)
    return advantages * weight_BT


def mask_tokens(methods: Sequence[Method], batch: Batch, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The final advantages and the loss mask of all completions, each (B, T), from their weighed advantages.

    If the methods leave no token at all, the mask stays the response's and all advantages are 0, because a mean over
    nothing is NaN.
    """
    mask_BT = batch.response_mask.bool()
    for method in sorted(methods, key=lambda method: method.masks_last):
        mask_BT = mask_BT & method.loss_mask(batch, advantages, mask_BT).bool()
    if not mask_BT.any():
        return torch.zeros_like(advantages), batch.response_mask
    return advantages * mask_BT, mask_BT.to(batch.response_mask.dtype)


def save_states(methods: dict[str, Method], folder: Path) -> None:
    """Write what the methods learned into the folder of a checkpoint."""
    (folder / STATES_FILE).write_text(json.dumps({name: method.state_dict() for name, method in methods.items()}))


def load_states(methods: dict[str, Method], folder: Path) -> None:
    """Let the methods resume from the folder of a checkpoint.

    Raises:
        ValueError: it holds no state of one of them.
    """
    path = folder / STATES_FILE
    states = json.loads(path.read_text()) if path.is_file() else {}
    for name, method in methods.items():
        if name not in states:
            raise ValueError(f"methods.{name}: {path} has no state of it; choose a checkpoint of this variant.")
        method.load_state_dict(states[name])
