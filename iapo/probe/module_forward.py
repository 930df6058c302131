"""Replace the forward of a module, or limit it to some tokens, for as long as a context lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """Let this instance of a module be called as `forward`. Its own is restored at the end."""
    original = module.forward
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the instance's, which hid the class's
        if module.forward != original:  # the instance had one before
            module.forward = original


def tokenwise_siblings(model: torch.nn.Module, attention: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules next to an attention in its layer whose parameters all belong to linear layers.

    Those are MLPs, which compute every token independently of the others.
    """
    layer = next((m for m in model.modules() if any(child is attention for child in m.children())), None)
    found = []
    for sibling in [] if layer is None else layer.children():
        linear = {p for m in sibling.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters(recurse=False)}
        if sibling is not attention and linear and linear == set(sibling.parameters()):
            found.append(sibling)
    return found


def limited_to(rows: torch.Tensor, tokens: int, forward: Callable) -> Callable:
    """The `forward` of a token-wise module, limited to these rows of its input (1, tokens, D); the others' output is 0.

    It is not limited where its input has another shape, where it gets further arguments, or where it returns no tensor.
    """

    def limited(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or x.dim() != 3 or x.shape[:2] != (1, tokens):
            return forward(x, *args, **kwargs)
        out = forward(x[:, rows])
        if not isinstance(out, torch.Tensor) or out.shape[:2] != (1, len(rows)):
            return forward(x)
        return out.new_zeros(1, tokens, out.shape[-1]).index_copy_(1, rows, out)

    return limited
