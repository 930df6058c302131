"""The reference of the fast pass, and the comparison of both on a given model.

The reference shares nothing with `iapo.probe.measure`: no cache, packing, padding, mask or tensor interpolation.
"""

from collections.abc import Sequence

import torch

from iapo.probe.batch import probe_tensor, vocabulary_size
from iapo.probe.measure import exit_entropies
from iapo.probe.packing import Completion
from iapo.probe.supported_models import USE_ANOTHER, CausalLM


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H = log s - (sum_v e^{z_v} z_v) / s,  s = sum_v e^{z_v},  in nats, over the last dimension, float32.

    The largest z is subtracted first, and the weights are divided by their own sum. torch's softmax of 49,152 float32
    logits sums to 1 + 1.6e-5; H = logsumexp(z) - softmax(z) z would be off by that times z, 4e-4 nats.
    """
    z = logits.float()
    z = (z - z.amax(-1, keepdim=True)).clamp_(min=-1e30)  # finite, because 0 * -inf would be NaN
    weights = z.exp()
    total = weights.sum(-1)
    return total.log() - weights.mul_(z).sum(-1) / total


def exit_entropies_naive(
    model: CausalLM,
    completions: Sequence[Completion],
    probe_ids: Sequence[int] | torch.Tensor,
    *,
    max_tokens: int | None = None,
    chunk_size: int | None = None,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """The twin of `iapo.probe.measure.exit_entropies`: one plain forward per probed position.

    Same arguments and result, for any causal LM. `max_tokens` and `chunk_size` have no effect.
    """
    probe_P = torch.as_tensor(probe_ids, dtype=torch.long).cpu()
    results = []
    for completion in completions:
        positions = completion.positions.tolist()
        suffixes = [probe_P] * len(positions) if completion.suffixes is None else completion.suffixes
        values = [value_at(model, completion, t, probe, device) for t, probe in zip(positions, suffixes, strict=True)]
        h = [interpolated(values, positions, t) for t in range(len(completion.response) + 1)]
        results.append(torch.tensor(h, dtype=torch.float32))
    return results


def value_at(
    model: CausalLM, completion: Completion, t: int, probe_P: torch.Tensor, device: torch.device | str
) -> float:
    """Entropy of the next token, or surprisal of the answer, in nats, after t response tokens and the probe."""
    answer = completion.answer
    suffix = probe_P if answer is None else torch.cat([probe_P, answer])
    sequence = torch.cat([completion.prompt, completion.response[:t], suffix]).to(device)
    with torch.no_grad():
        logits = model(input_ids=sequence[None], use_cache=False).logits[0]
    if answer is None:
        return entropy(logits[-1]).item()
    log_probs = logits[-1 - len(answer) : -1].double().log_softmax(-1)
    return -sum(log_probs[k, token].item() for k, token in enumerate(answer))


def interpolated(values: Sequence[float], positions: Sequence[int], t: int) -> float:
    """The value at t: linear between the values at the positions, constant before the first and after the last."""
    right = next((j for j, position in enumerate(positions) if position >= t), None)
    if right is None:
        return values[-1]
    if right == 0:
        return values[0]
    if positions[right] == t:
        return values[right]
    start, end = positions[right - 1], positions[right]
    return values[right - 1] + (values[right] - values[right - 1]) * (t - start) / (end - start)


def check_exactness(
    model: CausalLM, probe_ids: Sequence[int] | torch.Tensor, *, device: torch.device | str = "cpu"
) -> float:
    """Compare the pass with plain forwards on a short random text: finds what `check_model` can't know of a model.

    It makes 13 short forwards and four packed ones, equally many on every rank of an FSDP model. The packed ones have
    probes in the trajectories' own forward and in later ones, at consecutive positions and at others. Once per model is
    enough. An error of the method (a layer that mixes tokens in a way of its own, positions that don't count from 0)
    shows at any length, and is tenths of a nat unless the model is random.

    Returns:
        Mean absolute difference between `exit_entropies` and `exit_entropies_naive`, in nats.

    Raises:
        ValueError: the difference is above 0.001, or above 0.2 where not everything is computed in float32, because
            rounding alone makes hundredths there; or as `exit_entropies`; or a probe token is not in the vocabulary.
    """
    vocabulary = vocabulary_size(model)
    probe_P = probe_tensor(probe_ids, vocabulary)
    positions = torch.tensor([0, 1, 2, 10, 17, 24])
    generator = torch.Generator().manual_seed(0)
    prompts, responses = torch.randint(vocabulary, (2, 32), generator=generator).split([8, 24], dim=1)
    # Completions of one prompt share its keys and values.
    completions = [Completion(prompts[0], response, positions) for response in responses]
    fast = exit_entropies(model, completions, probe_P, chunk_size=3, device=device)
    naive = exit_entropies_naive(model, completions, probe_P, device=device)
    error = (torch.stack(fast) - torch.stack(naive))[:, positions].abs().mean().item()
    with torch.no_grad():
        sequence = torch.cat([prompts[0], responses[0]]).to(device)
        logits = model(input_ids=sequence[None], use_cache=False).logits
    exact = logits.dtype == model.dtype == torch.float32 and not torch.is_autocast_enabled(logits.device.type)
    allowed = 1e-3 if exact else 0.2
    if not error <= allowed:
        raise ValueError(
            f"model: on a random text the exit-entropy pass and plain forwards of {type(model).__name__} differ by "
            f"{error:.2g} nats on average, more than {allowed}, so it can't be served exactly; {USE_ANOTHER}"
        )
    return error
