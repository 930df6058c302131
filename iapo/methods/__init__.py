"""Methods of token-efficient RL. `base` has the protocol, `combine` applies the methods of a run; every other module is
one method.

docs/methods.md lists the methods and docs/adding-a-method.md adds one.
"""

from iapo.methods.base import HOOKS, OPTIONAL, Batch, Method, acts_by, check_choice, check_number
from iapo.methods.combine import conflicts, load_states, make_methods, mask_tokens, save_states, select, weigh

__all__ = [
    "HOOKS",
    "OPTIONAL",
    "Batch",
    "Method",
    "acts_by",
    "check_choice",
    "check_number",
    "conflicts",
    "load_states",
    "make_methods",
    "mask_tokens",
    "save_states",
    "select",
    "weigh",
]
