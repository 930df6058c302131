"""Methods of token-efficient RL: `base` has the protocol, every other module is one method.

docs/adding-a-method.md walks through an example.
"""

from iapo.methods.base import (
    HOOKS,
    OPTIONAL,
    Batch,
    Method,
    acts_by,
    choice,
    conflicts,
    load_states,
    make_methods,
    number,
    save_states,
    select,
    weigh,
)

__all__ = [
    "HOOKS",
    "OPTIONAL",
    "Batch",
    "Method",
    "acts_by",
    "choice",
    "conflicts",
    "load_states",
    "make_methods",
    "number",
    "save_states",
    "select",
    "weigh",
]
