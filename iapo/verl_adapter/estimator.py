"""The advantage estimator `iapo` of verl's registry: it carries `iapo.step.step_advantage` to verl.

verl calls an estimator with rewards, mask, config and group index only. What the terms and methods need beyond that is
bound around the call by the trainer, which also takes the whole result from there. So none of verl's code is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from verl.trainer.ppo.core_algos import register_adv_est

from iapo.step import StepAdvantage, StepInputs, step_advantage


@dataclass
class Carrier:
    """What goes in with a call of the estimator, and what came out of the last one."""

    inputs: StepInputs
    result: StepAdvantage | None = None


_carrier: ContextVar[Carrier] = ContextVar("iapo_step")


@contextmanager
def bind(inputs: StepInputs) -> Iterator[Carrier]:
    """Hand `inputs` to the estimator's calls inside the context, and their result back."""
    token = _carrier.set(Carrier(inputs))
    try:
        yield _carrier.get()
    finally:
        _carrier.reset(token)


@register_adv_est("iapo")
def compute_iapo_advantage(token_level_rewards, response_mask, index, config=None, **_):
    """The advantages of `iapo.step.step_advantage`.

    Args:
        token_level_rewards, response_mask: (B, T).
        index: (B,) group of each completion.
        config: verl's `algorithm` section; `norm_adv_by_std_in_grpo` is honoured.

    Returns:
        advantages and returns, equal, (B, T), as GRPO's.

    Raises:
        RuntimeError: outside of `bind`, that is with another trainer than iapo's.
    """
    carrier = _carrier.get(None)
    if carrier is None:
        raise RuntimeError(
            "algorithm.adv_estimator: 'iapo' needs trainer.v1.trainer_mode=iapo, which measures exit entropies; "
            "start the run with iapo train."
        )
    divide_by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    inputs = replace(carrier.inputs, divide_by_std=divide_by_std)
    carrier.result = step_advantage(token_level_rewards.sum(-1), response_mask, list(index), inputs)
    return carrier.result.advantages, carrier.result.advantages
