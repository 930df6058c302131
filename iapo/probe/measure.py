"""The exact fast pass: exit entropies of completions, by few packed forwards.

The method's two savings are the paper's (arXiv 2602.19049, early-exit estimate): one forward of a whole trajectory,
whose keys and values are kept, and the probes of many positions per forward. Unlike the released code, nothing is
copied per position: the probes are queries of one shared copy, see `iapo.probe.attention`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from iapo.probe.attention import Cascade, KeysAndValues, MaskedAttention, captured_attention, cascade_attention
from iapo.probe.output_layer import MeasuredOutputLayer, measured_output_layer
from iapo.probe.packing import Completion, Forward, forwards_of_pack, longest, packs
from iapo.probe.supported_models import CausalLM, check_model

# Tokens per forward where the caller names no number, by device: a CPU's caches suit few, a GPU's cores many.
MAX_TOKENS = {"cpu": 768, "cuda": 16384}
# Bytes that the tensors of such a forward may take, without those of the output layer (`iapo.probe.output_layer`).
MEMORY_BUDGET = 2 * 2**30


def exit_entropies(
    model: CausalLM,
    completions: Sequence[Completion],
    probe_ids: Sequence[int] | torch.Tensor,
    *,
    max_tokens: int | None = None,
    chunk_size: int | None = None,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """`iapo.information.exit_entropy` without padding.

    Completions of one prompt share its keys and values. The number of forwards is `iapo.probe.packing.forward_count`.

    Args:
        probe_ids: the P tokens of the exit probe.
        max_tokens: tokens per forward (one trajectory always fits); None: `default_max_tokens`.
        chunk_size: probes per forward; None: as many as `max_tokens` holds.
        device: the model's.

    Returns:
        For every completion h_0 .. h_{R_i}, (R_i + 1,) float32 in nats, on the CPU.

    Raises:
        ValueError: an empty prompt or probe, answers for some completions only, or a model that can't be served.
    """
    probe_P = torch.as_tensor(probe_ids, dtype=torch.long).cpu()
    max_tokens = max_tokens or default_max_tokens(model.config, device)
    check_input(completions, probe_P)
    check_model(model, longest(completions, len(probe_P)))
    probed = [torch.zeros(len(completion.positions)) for completion in completions]
    with torch.no_grad(), cascade_attention(model) as attention, measured_output_layer(model) as output_layer:
        for groups in packs(completions, max_tokens):
            forwards = forwards_of_pack(completions, groups, probe_P, max_tokens, chunk_size)
            measure_forwards(model, attention, output_layer, forwards, probed, device)
    return [interpolate(h, c.positions, len(c.response)) for h, c in zip(probed, completions, strict=True)]


def check_input(completions: Sequence[Completion], probe_P: torch.Tensor) -> None:
    """Refuse an empty probe, empty prompts, and answers for some completions only.

    Raises:
        ValueError: names the argument, its value and the fix.
    """
    if len(probe_P) == 0:
        raise ValueError("probe_ids: [] has no token; pass at least one.")
    for i, completion in enumerate(completions):
        if len(completion.prompt) == 0:
            raise ValueError(f"completions: the prompt of number {i} has no token; give it at least one.")
    answered = sum(completion.answer is not None for completion in completions)
    if 0 < answered < len(completions):
        raise ValueError(
            f"completions: {answered} of {len(completions)} have an answer to score; give one to all or to none."
        )


@contextmanager
def forward_to_share(model: CausalLM) -> Iterator[KeysAndValues]:
    """The keys and values of the one forward that runs inside, of packed sequences, for `exit_entropies_after`.

    That forward is bit for bit what it would be outside, its attention and its logits. The model must be one that
    `iapo.probe.attention.can_capture`.

    Raises:
        ValueError: as `exit_entropies`, from within the forward.
    """
    with captured_attention(model) as keys_and_values, measured_output_layer(model) as output_layer:
        output_layer.start(None, measures=False)
        handle = model.register_forward_hook(lambda _, inputs, output: output_layer.check(model, output.logits))
        try:
            yield keys_and_values
        finally:
            handle.remove()


def exit_entropies_after(
    model: CausalLM,
    completions: Sequence[Completion],
    probes: Iterable[Forward],
    keys_and_values: KeysAndValues,
    *,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """`exit_entropies` by the keys and values that `forward_to_share` gave.

    Args:
        probes: `iapo.probe.packing.probe_forwards` with the completions' slots in that forward.
    """
    probed = [torch.zeros(len(completion.positions)) for completion in completions]
    with torch.no_grad(), cascade_attention(model) as attention, measured_output_layer(model) as output_layer:
        assert isinstance(attention, Cascade), "a model that can't be captured has no keys and values to share"
        attention.stored = keys_and_values
        measure_forwards(model, attention, output_layer, probes, probed, device)
    return [interpolate(h, c.positions, len(c.response)) for h, c in zip(probed, completions, strict=True)]


def measure_forwards(
    model: CausalLM,
    attention: Cascade | MaskedAttention,
    output_layer: MeasuredOutputLayer,
    forwards: Iterable[Forward],
    probed: Sequence[torch.Tensor],
    device: torch.device | str,
) -> None:
    """Make the forwards and write the entropies or surprisals into `probed`: (J_i,) per completion, by position."""
    for forward in forwards:
        output_layer.start(forward.targets, measures=forward.scored is not None)
        token_ids, position_ids = forward.token_ids.to(device), forward.position_ids.to(device)
        result = attention.forward(token_ids, position_ids, forward.parts, forward.scored, forward.stored)
        if forward.stored:  # once per pack
            output_layer.check(model, result.logits)
        if forward.scored is None:
            continue
        assert forward.probe_of_scored is not None
        # The surprisal of an answer is the sum over its tokens.
        h = torch.zeros(int(forward.probe_of_scored[-1]) + 1)
        h.index_add_(0, forward.probe_of_scored, output_layer.scores.cpu())
        for i, first, last in forward.blocks:
            probed[i][first : last + 1], h = h[: last + 1 - first], h[last + 1 - first :]


def interpolate(values: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
    """(length + 1,) from values (J,) at positions (J,): linear in between, constant after the last."""
    t = torch.arange(length + 1).clamp(max=int(positions[-1]))
    right = torch.searchsorted(positions, t)
    left = (right - 1).clamp(min=0)
    fraction = (t - positions[left]) / (positions[right] - positions[left]).clamp(min=1)
    return values[left] + (values[right] - values[left]) * fraction


def default_max_tokens(config: Any, device: torch.device | str | int) -> int:
    """Tokens per forward: as many as suit the device, or as `MEMORY_BUDGET` holds if those are fewer, at least 1.

        bytes per token = 4 (4 hidden + 3 intermediate + 8 heads * head size + 2 layers * key heads * head size)

    This counts what exists at once in float32: the residual stream; the MLP's gate, up and product; queries, keys,
    values and the parts of the attention that are merged; and the trajectory's stored keys and values. A single
    trajectory is one forward whatever its length. A device that isn't listed counts as a GPU.

    Args:
        config: the model's Hugging Face config.
    """
    text = config.get_text_config(decoder=True)
    hidden, heads = text.hidden_size, getattr(text, "num_attention_heads", None) or 1  # Mamba has none
    head_size = getattr(text, "head_dim", None) or hidden // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    intermediate = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    if isinstance(intermediate, list):  # one per layer, as in Gemma 3n
        intermediate = max(intermediate)
    stored = 2 * text.num_hidden_layers * key_heads * head_size
    bytes_per_token = 4 * (4 * hidden + 3 * intermediate + 8 * heads * head_size + stored)
    kind = device if isinstance(device, str) else getattr(device, "type", "cuda")
    suits = MAX_TOKENS.get(kind.partition(":")[0], MAX_TOKENS["cuda"])
    return max(min(suits, MEMORY_BUDGET // bytes_per_token), 1)
