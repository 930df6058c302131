"""How much does each token tell about the final answer? Early-exit entropies, their gains and their rate.

Shape suffixes used throughout the package:
    B completions, T response tokens, S prompt + response columns, P probe tokens, J probed positions, V vocabulary.

Source: "IAPO: Information-Aware Policy Optimization for Token-Efficient Reasoning" (arXiv 2602.19049), the section
on the early-exit estimate of the conditional entropy. `iapo.probe` says how the entropies are measured.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from iapo.config import IapoConfig
from iapo.probe.batch import check_positive, completions_of, last_valid, probe_tensor, vocabulary_size
from iapo.probe.joins import Joins, measured
from iapo.probe.measure import default_max_tokens, exit_entropies, exit_entropies_after, forward_to_share
from iapo.probe.naive import check_exactness, entropy, exit_entropies_naive
from iapo.probe.supported_models import CausalLM

__all__ = [
    "Joins",
    "check_exactness",
    "default_max_tokens",
    "entropy",
    "exit_entropies",
    "exit_entropies_after",
    "exit_entropies_naive",
    "exit_entropy",
    "exit_entropy_naive",
    "forward_to_share",
    "information_gain",
    "information_rate",
    "next_token_entropies",
]


def exit_entropy(
    model: CausalLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
    probe_ids: Sequence[int] | torch.Tensor,
    *,
    chunk_size: int | None = None,
    stride: int = IapoConfig.stride,
    boundaries: torch.Tensor | None = None,
    max_gap: int = IapoConfig.max_gap,
    answers: Sequence[torch.Tensor] | None = None,
    max_tokens: int | None = None,
    joins: Joins | None = None,
    measure: Callable[..., list[torch.Tensor]] = exit_entropies,
) -> torch.Tensor:
    r"""Entropy of the answer if the model had to answer now, after every response token.

        h_t = H(next token | prompt, o_1..o_t, probe),    t = 0..T      [nats]

    This is the entropy of the model's next-token distribution (temperature 1) after the first t response tokens and the
    exit probe (arXiv 2602.19049, early-exit estimate). With `answers` it is the surprisal of a whole answer instead:

        h_t = -log p(answer | prompt, o_1..o_t, probe)     [nats]

    Its gains are each token's pointwise information about all tokens of that answer.

    Args:
        model: a Hugging Face causal LM in eval mode with rotary or learned positions and standard attention, or the
            root module of an FSDP model. Models that can't be served exactly are refused, see
            `iapo.probe.supported_models.check_model`.
        input_ids: (B, S) left-padded prompt, then right-padded response in the last T columns.
        attention_mask: (B, S) 1 on prompt and response tokens, 0 on padding.
        response_mask: (B, T) 1 on the tokens whose information is measured. Nothing is probed after a row's last 1.
        probe_ids: the P tokens of the exit probe, e.g. of "</think>\n<answer>".
        chunk_size: probes per forward; None: as many as `max_tokens` holds. It affects speed and memory, not the
            result.
        stride: probe positions 0, k, 2k, ... and each row's last one. h is linear between them: the gain of a segment
            is spread evenly over its tokens, and the sum of the gains is exact.
        boundaries: (B, T) 1 on tokens that end a reasoning step. Probe after those; `stride` has no effect then.
        max_gap: with `boundaries`, probe in between too, so that no two probes are further apart.
        answers: B tensors of token ids, which are scored after the probe. An empty one has surprisal 0 everywhere.
        max_tokens: tokens per forward (one trajectory always fits); None: what suits the device, see
            `default_max_tokens`. It affects speed and memory, not the result.
        joins: how the probe is written after each token, where a tokenizer would write the join with other tokens, see
            `iapo.probe.joins`; None: by `probe_ids` everywhere.
        measure: what measures the completions: `exit_entropies` or its naive twin.

    Returns:
        (B, T + 1) float32, h_0 .. h_T in nats, constant after a row's last valid token. A row without a valid token
        has h_0 everywhere. Logits and entropies are float32 for models of any dtype.

    Raises:
        ValueError: an argument is malformed, or the model can't be served. It names the argument, its value and the
            fix.
    """
    vocabulary = vocabulary_size(model)
    completions = completions_of(
        input_ids,
        attention_mask,
        response_mask,
        vocabulary,
        stride=stride,
        boundaries=boundaries,
        max_gap=max_gap,
        answers=answers,
    )
    for name, value in (("chunk_size", chunk_size), ("max_tokens", max_tokens)):
        if value is not None:
            check_positive(name, value)
    probe_P = probe_tensor(probe_ids, vocabulary)
    options = dict(max_tokens=max_tokens, chunk_size=chunk_size, device=input_ids.device)
    values = measured(completions, joins, lambda parts: measure(model, parts, probe_P, **options))
    h_BT1 = torch.zeros(response_mask.shape[0], response_mask.shape[1] + 1)
    for row, h in zip(h_BT1, values, strict=True):
        row.copy_(h)
    return h_BT1.to(input_ids.device)


exit_entropy_naive = partial(exit_entropy, measure=exit_entropies_naive)
exit_entropy_naive.__doc__ = """The reference of `exit_entropy`: one plain forward per position, no cache, no packing.

Same arguments, result and errors, but any model is served; `chunk_size` and `max_tokens` have no effect.
"""


def information_gain(exit_entropy: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Information that each token gives about the final answer (arXiv 2602.19049, token-level informativeness).

        s[i,t] = I(y; o_t | q, o_<t) = h[i,t-1] - h[i,t]      [nats],   sum_t s[i,t] = h[i,0] - h[i,T]

    Args:
        exit_entropy: (B, T + 1) from `exit_entropy`.
        response_mask: (B, T) the mask that it was computed with.

    Returns:
        (B, T) float32; 0 where the mask is 0. Negative where a token makes the answer less certain.

    Raises:
        ValueError: the shapes don't fit.
    """
    _check_entropy_shape(exit_entropy, response_mask)
    return (exit_entropy[:, :-1] - exit_entropy[:, 1:]) * response_mask


def information_rate(exit_entropy: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Information per token of a completion (ours, not in the paper; see docs/algorithm.md).

        rate_i = (h[i,0] - h[i,T]) / |o_i|      [nats per token]

    Args:
        exit_entropy: (B, T + 1) from `exit_entropy`. Its region may be shorter than the response.
        response_mask: (B, T) of the whole response, whose length is |o_i|.

    Returns:
        (B,) float32; 0 for a completion without tokens.

    Raises:
        ValueError: the shapes don't fit.
    """
    _check_entropy_shape(exit_entropy, response_mask)
    return (exit_entropy[:, 0] - exit_entropy[:, -1]) / response_mask.sum(1).clamp(min=1)


def next_token_entropies(entropy: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    r"""h_t for `information_gain` without probes: the paper's ablation that drops the early exit (arXiv 2602.19049).

        h_t = H(o_{t+1} | q, o_1..o_t),    t = 0..L-1,    and h_L = h_{L-1}      [nats]

    for a completion of L tokens. No token follows the last one, so its gain is 0. That matters only for completions
    that were cut: the token that ends a completion is in no region.

    Args:
        entropy: (B, T) of the policy's distribution from which each token was drawn, in nats.
        response_mask: (B, T) 1 on the L tokens of each row, right-padded.

    Returns:
        (B, T + 1) float32, constant after a row's last token.
    """
    last_B1 = (last_valid(response_mask)[:, None] - 1).clamp(min=0)
    t_T1 = torch.arange(entropy.shape[1] + 1, device=entropy.device)
    return entropy.float().gather(1, torch.minimum(t_T1, last_B1))


def _check_entropy_shape(exit_entropy: torch.Tensor, response_mask: torch.Tensor) -> None:
    B, T = response_mask.shape
    if exit_entropy.shape != (B, T + 1):
        raise ValueError(f"exit_entropy: shape {tuple(exit_entropy.shape)} must be (B, T + 1) = {(B, T + 1)}.")
