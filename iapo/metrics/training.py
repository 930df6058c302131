"""The `iapo/*` metrics; docs/metrics.md says what each means. Pure functions of a step's tensors."""

import math
import numbers
from collections import Counter
from decimal import Decimal

import torch

from iapo.advantage import advantage_shares
from iapo.information import information_gain, information_rate
from iapo.methods.base import Method
from iapo.step import StepAdvantage, StepInputs


def information_metrics(
    inputs: StepInputs, result: StepAdvantage, response_mask: torch.Tensor, probe_tokens: int = 0, seconds: float = 0.0
) -> dict[str, float]:
    """Exit entropies, gains, rate and each term's share of the advantage, over completions with at least one token.

    With next-token entropies only the gains are reported: verl reports the mean, and no rate exists.

    Args:
        response_mask: (B, T); rows of zeros are verl's padding.
        probe_tokens: that the exit-entropy pass pushed through the model, trajectories not counted.
        seconds: wall time of that pass; 0 without one.

    Returns:
        `iapo/advantage_share/<term>` always. Where a term reads gains, of exit entropies or of next-token entropies in
        their place, `iapo/information_gain/{mean,std}`; with exit entropies `iapo/exit_entropy/{start,end}`,
        `iapo/information_rate` and `iapo/negative_information`. `iapo/probe_tokens_per_second` where a pass was made.
    """
    shares = advantage_shares(result.terms, response_mask)
    metrics = {f"iapo/advantage_share/{name}": share for name, share in shares.items()}
    if inputs.exit_entropy is None or inputs.region_mask is None:
        return metrics
    real = response_mask.bool().any(1)
    h, region = inputs.exit_entropy[real], inputs.region_mask[real]
    if inputs.config.needs_gains:  # else only the ends were measured
        gains = information_gain(h, region)[region.bool()]
        metrics |= {
            "iapo/information_gain/mean": gains.mean().item() if len(gains) else 0.0,
            "iapo/information_gain/std": gains.std(correction=0).item() if len(gains) else 0.0,
        }
    if inputs.config.needs_exit_entropy:
        metrics |= {
            "iapo/exit_entropy/start": h[:, 0].mean().item(),
            "iapo/exit_entropy/end": h[:, -1].mean().item(),
            "iapo/information_rate": information_rate(h, response_mask[real]).mean().item(),
            "iapo/negative_information": (h[:, -1] > h[:, 0]).float().mean().item(),
        }
    if seconds:
        metrics["iapo/probe_tokens_per_second"] = probe_tokens / seconds
    return metrics


def method_metrics(methods: dict[str, Method], result: StepAdvantage, response_mask: torch.Tensor) -> dict[str, float]:
    """What the methods did to the step, and the numbers that they learned; nothing without methods.

    Args:
        methods: by name.
        response_mask: (B, T).

    Returns:
        `iapo/method/{completions,tokens}_kept` and, for each number of a method's state, `iapo/method/<name>/<number>`.
    """
    if not methods:
        return {}
    real, trained_BT = response_mask.bool().any(1), result.loss_mask.bool() & result.trains[:, None]
    metrics = {
        "iapo/method/completions_kept": trained_BT[real].any(1).float().mean().item(),
        "iapo/method/tokens_kept": trained_BT.sum().item() / response_mask.sum().item(),
    }
    for name, method in methods.items():
        numbers = {k: v for k, v in method.state_dict().items() if isinstance(v, int | float)}
        metrics |= {f"iapo/method/{name}/{key}": float(value) for key, value in numbers.items()}
    return metrics


def reward_metrics(infos: list[dict]) -> dict[str, float]:
    """Of the training completions: the mean of every number in their reward infos, and the share of each failure.

    For example iapo/reward/acc and, by the infos' `failure_reason`, iapo/reward/no_answer. All of "error: <what>" count
    as "error". A number is what `number` takes for one. A completion that lacks an entry doesn't count for it.

    Raises:
        ValueError: an `acc` that is no finite number.
    """
    columns: dict[str, list[float]] = {}
    for info in infos:
        if "acc" in info:
            check_acc(info["acc"])
        for name, value in info.items():
            if (plain := number(value)) is not None:
                columns.setdefault(name, []).append(plain)
    means = {f"iapo/reward/{name}": sum(values) / len(values) for name, values in sorted(columns.items())}
    reasons = Counter(str(info.get("failure_reason") or "").partition(":")[0] for info in infos)
    return means | {f"iapo/reward/{reason}": n / len(infos) for reason, n in sorted(reasons.items()) if reason}


def number(value: object) -> float | None:
    """A real number of Python, numpy or torch as a float, also in an array of one; None for anything else."""
    if hasattr(value, "item"):
        if math.prod(getattr(value, "shape", ())) != 1:
            return None
        value = value.item()
    return float(value) if isinstance(value, numbers.Real | Decimal) else None


def check_acc(value: object) -> None:
    """Raises ValueError unless an `acc` is a finite number: right answers would be counted as wrong, or not at all."""
    plain = number(value)
    if plain is None or not math.isfinite(plain):
        raise ValueError(
            f"acc: {value!r} must be a finite number; let the reward function return 1 if the answer is right, else 0."
        )
