"""How much does each token tell about the final answer? Early-exit entropies, their gains and their rate.

Shape suffixes used throughout the package:
    B completions, T response tokens, S prompt + response columns, P probe tokens, J probed positions, V vocabulary.

Source: "IAPO: Information-Aware Policy Optimization for Token-Efficient Reasoning" (arXiv 2602.19049), the section
on the early-exit estimate of the conditional entropy, with its two savings: one forward of the whole trajectory
whose keys and values are kept, and many positions' probes per forward. Unlike the released code, nothing is copied
per position: the probes are queries of ONE shared copy, see `iapo.probe.attention`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from iapo.probe.attention import KeysAndValues, captured_attention, cascade_attention
from iapo.probe.output_layer import measured_output_layer
from iapo.probe.packing import Completion, Forward, forwards_of_pack, longest, packs, probe_positions
from iapo.probe.supported_models import check_model

# Tokens per forward where the caller doesn't say, by device: a CPU's caches like few, a GPU's cores many.
MAX_TOKENS = {"cpu": 768, "cuda": 16384}
# Bytes that the tensors of a forward may take then, those of the output layer aside (`iapo.probe.output_layer`).
MEMORY_BUDGET = 2 * 2**30


def exit_entropy(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
    probe_ids: Sequence[int] | torch.Tensor,
    *,
    chunk_size: int | None = None,
    stride: int = 1,
    boundaries: torch.Tensor | None = None,
    max_gap: int = 64,
    answers: Sequence[torch.Tensor] | None = None,
    max_tokens: int | None = None,
) -> torch.Tensor:
    r"""Entropy of the answer if the model had to answer now, after every response token.

        h_t = H(next token | prompt, o_1..o_t, probe),    t = 0..T      [nats]

    the entropy of the model's next-token distribution (temperature 1) after the exit probe is appended to the first
    t response tokens (arXiv 2602.19049, early-exit estimate). With `answers`, the surprisal of a whole answer instead:

        h_t = -log p(answer | prompt, o_1..o_t, probe)     [nats]

    whose gains are the pointwise information of each token about that answer, all its tokens counted.

    Args:
        model: a Hugging Face causal LM in eval mode, rotary or learned positions, standard attention; also the root
            module of an FSDP model. Models that this method can't serve exactly are refused, see `check_model`.
        input_ids: (B, S) left-padded prompt, then right-padded response in the last T columns.
        attention_mask: (B, S) 1 on prompt and response tokens, 0 on padding.
        response_mask: (B, T) 1 on the tokens whose information is asked for. Nothing is probed after a row's last 1.
        probe_ids: the P tokens of the exit probe, e.g. of "</think>\n<answer>".
        chunk_size: probes per forward; None: as many as `max_tokens` holds. Speed and memory, not the result.
        stride: probe positions 0, k, 2k, ... and each row's last one; h is linear between them, so the gain of a
            segment is spread evenly over its tokens and the sum of the gains is exact.
        boundaries: (B, T) 1 on tokens that end a reasoning step: probe after those instead, whatever `stride`.
        max_gap: with `boundaries`: probe in between too, so that no two probes are further apart.
        answers: B tensors of token ids, those that would follow the probe. An empty one has surprisal 0 everywhere.
        max_tokens: tokens per forward (one trajectory always fits); None: what suits the device. Speed and memory, not
            the result.

    Returns:
        (B, T + 1) float32, h_0 .. h_T in nats, constant after a row's last valid token. A row without a valid token
        holds h_0 everywhere. Logits and entropies are float32 whatever the dtype of the model.

    Raises:
        ValueError: malformed inputs or a model that can't be served; names the argument, its value and the fix.
    """
    probe_ids, completions = _unpad(
        model,
        input_ids,
        attention_mask,
        response_mask,
        probe_ids,
        chunk_size,
        stride,
        boundaries,
        max_gap,
        answers,
        max_tokens,
    )
    h_BT1 = torch.zeros(response_mask.shape[0], response_mask.shape[1] + 1)
    values = exit_entropies(
        model, completions, probe_ids, max_tokens=max_tokens, chunk_size=chunk_size, device=input_ids.device
    )
    for i, h in enumerate(values):
        h_BT1[i] = F.pad(h[None], (0, h_BT1.shape[1] - len(h)), mode="replicate")[0]
    return h_BT1.to(input_ids.device)


def exit_entropies(
    model,
    completions: Sequence[Completion],
    probe_ids: Sequence[int] | torch.Tensor,
    *,
    max_tokens: int | None = None,
    chunk_size: int | None = None,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """h_0 .. h_{R_i}, on the CPU, of every completion: `exit_entropy` without padding.

    Completions of one prompt share its keys and values. The number of forwards is `iapo.probe.packing.forward_count`.

    Raises:
        ValueError: an empty prompt or probe, answers for some completions only, a model that can't be served.
    """
    probe_ids = torch.as_tensor(probe_ids, dtype=torch.long).cpu()
    max_tokens = max_tokens or default_max_tokens(model.config, device)
    if len(probe_ids) == 0 or any(len(c.prompt) == 0 for c in completions):
        raise ValueError("completions: the probe and every prompt need at least one token.")
    if len({c.answer is None for c in completions}) > 1:
        raise ValueError("completions: all of them or none must have an answer to score.")
    check_model(model, longest(completions, len(probe_ids)))
    probed = [torch.zeros(len(completion.positions)) for completion in completions]
    with torch.no_grad(), cascade_attention(model) as attention, measured_output_layer(model) as output_layer:
        for groups in packs(completions, max_tokens):
            forwards = forwards_of_pack(completions, groups, probe_ids, max_tokens, chunk_size)
            _run(model, attention, output_layer, forwards, probed, device)
    return [interpolate(h, c.positions, len(c.response)) for h, c in zip(probed, completions, strict=True)]


@contextmanager
def forward_to_share(model) -> Iterator[KeysAndValues]:
    """The keys and values of the one forward that runs inside, of packed sequences, for `exit_entropies_after`.

    That forward itself, its attention and its logits, are bit for bit what they would be outside. For models that
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
    model,
    completions: Sequence[Completion],
    probes: Iterable[Forward],
    keys_and_values: KeysAndValues,
    *,
    device: torch.device | str = "cpu",
) -> list[torch.Tensor]:
    """`exit_entropies` where the trajectories' keys and values are there already, by `forward_to_share`.

    Args:
        probes: `iapo.probe.packing.probe_forwards` at the completions' places in that forward.
    """
    probed = [torch.zeros(len(completion.positions)) for completion in completions]
    with torch.no_grad(), cascade_attention(model) as attention, measured_output_layer(model) as output_layer:
        attention.stored = keys_and_values
        _run(model, attention, output_layer, probes, probed, device)
    return [interpolate(h, c.positions, len(c.response)) for h, c in zip(probed, completions, strict=True)]


def _run(model, attention, output_layer, forwards: Iterable[Forward], probed: list[torch.Tensor], device) -> None:
    """Write the entropies or surprisals at the probed positions of every row into `probed`."""
    for forward in forwards:
        output_layer.start(forward.targets, measures=forward.scored is not None)
        token_ids, position_ids = forward.token_ids.to(device), forward.position_ids.to(device)
        result = attention.run(token_ids, position_ids, forward.parts, forward.scored, forward.stored)
        if forward.stored:  # once per pack
            output_layer.check(model, result.logits)
        if forward.scored is None:
            continue
        scores = (output_layer.entropy if forward.targets is None else -output_layer.log_prob).cpu()
        h = torch.zeros(int(forward.probe_of_scored[-1]) + 1).index_add_(0, forward.probe_of_scored, scores)
        for i, first, last in forward.runs:
            probed[i][first : last + 1], h = h[: last + 1 - first], h[last + 1 - first :]


def exit_entropy_naive(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
    probe_ids: Sequence[int] | torch.Tensor,
    *,
    chunk_size: int | None = None,
    stride: int = 1,
    boundaries: torch.Tensor | None = None,
    max_gap: int = 64,
    answers: Sequence[torch.Tensor] | None = None,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """The reference of `exit_entropy`: one plain forward per position, without cache, packing, padding or mask.

    Same arguments, result and errors, but any model is served; `chunk_size` and `max_tokens` have no effect.
    """
    probe_ids, completions = _unpad(
        model,
        input_ids,
        attention_mask,
        response_mask,
        probe_ids,
        chunk_size,
        stride,
        boundaries,
        max_gap,
        answers,
        max_tokens,
    )
    h_BT1 = torch.zeros(response_mask.shape[0], response_mask.shape[1] + 1, device=input_ids.device)
    for b, (prompt, response, positions, answer) in enumerate(completions):
        values = []
        for t in positions.tolist():
            suffix = probe_ids if answer is None else torch.cat([probe_ids, answer])
            sequence = torch.cat([prompt, response[:t], suffix]).to(input_ids.device)
            with torch.no_grad():
                logits = model(input_ids=sequence[None], use_cache=False).logits[0].float()
            if answer is None:
                values.append(entropy(logits[-1]).item())
            else:
                log_probs = logits[-1 - len(answer) : -1].log_softmax(-1)
                values.append(-sum(log_probs[k, token].item() for k, token in enumerate(answer)))
        for t in range(h_BT1.shape[1]):
            right = next((j for j, position in enumerate(positions.tolist()) if position >= t), None)
            if right is None or positions[right] == t:
                h_BT1[b, t] = values[-1 if right is None else right]
            else:
                start, end = positions[right - 1].item(), positions[right].item()
                h_BT1[b, t] = values[right - 1] + (values[right] - values[right - 1]) * (t - start) / (end - start)
    return h_BT1


def check_exactness(model, probe_ids: Sequence[int] | torch.Tensor, *, device: torch.device | str = "cpu") -> float:
    """Compare the pass with plain forwards on a short random text: finds what `check_model` can't know of a model.

    13 short forwards and four packed ones, as many on every rank of an FSDP model: probes beside the trajectories and
    behind them, at consecutive positions and at others. Once per model is enough: an error of the method (a layer that
    mixes tokens by a way of its own, positions that don't count from 0) is there at any length, and tenths of a nat
    where a model isn't random.

    Returns:
        Mean absolute difference between `exit_entropy` and `exit_entropy_naive`, in nats.

    Raises:
        ValueError: it is above 0.001, or where not all is computed in float32 above 0.2, of which rounding alone
            makes hundredths; or as `exit_entropy`.
    """
    prompt, response, positions = 8, 24, [0, 1, 2, 10, 17, 24]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocabulary, (2, prompt + response), generator=generator).to(device)
    input_ids[1, :prompt] = input_ids[0, :prompt]  # completions of one prompt share its keys and values
    mask = torch.ones_like(input_ids)
    ends = torch.zeros(2, response, dtype=torch.bool)
    ends[:, [t - 1 for t in positions[1:]]] = True
    arguments, options = (input_ids, mask, mask[:, prompt:], probe_ids), dict(boundaries=ends, chunk_size=3)
    difference = exit_entropy(model, *arguments, **options) - exit_entropy_naive(model, *arguments, **options)
    error = difference[:, positions].abs().mean().item()
    with torch.no_grad():
        logits = model(input_ids=input_ids[:1], use_cache=False).logits
    exact = logits.dtype == model.dtype == torch.float32 and not torch.is_autocast_enabled(logits.device.type)
    allowed = 1e-3 if exact else 0.2
    if not error <= allowed:
        raise ValueError(
            f"model: on a random text the exit-entropy pass and plain forwards of {type(model).__name__} differ by "
            f"{error:.2g} nats on average, more than {allowed}, so it can't be served exactly. Use another model, or "
            "set iapo.alpha=0 and iapo.rho=0."
        )
    return error


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
        exit_entropy: (B, T + 1) from `exit_entropy`, possibly over a shorter region than the response.
        response_mask: (B, T) of the whole response: its length |o_i| is what the information is paid with.

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

    for a completion of L tokens. Nothing comes after the last one, so that it gains nothing; that matters only where a
    completion was cut, because the token that ends one is in no region.

    Args:
        entropy: (B, T) of the policy's distribution that each token was drawn from, in nats.
        response_mask: (B, T) 1 on the L tokens of each row, right-padded.

    Returns:
        (B, T + 1) float32, constant after a row's last token.
    """
    last_B1 = (_last_valid(response_mask)[:, None] - 1).clamp(min=0)
    t_T1 = torch.arange(entropy.shape[1] + 1, device=entropy.device)
    return entropy.float().gather(1, torch.minimum(t_T1, last_B1))


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H = logsumexp(z) - sum_v softmax(z)_v z_v in nats, over the last dimension, float32."""
    logits = logits.float()
    probabilities = logits.softmax(-1)
    # A logit of -inf has probability 0 and adds 0, not NaN.
    return logits.logsumexp(-1) - torch.where(probabilities > 0, probabilities * logits, 0.0).sum(-1)


def default_max_tokens(config, device: torch.device | str | int) -> int:
    """Tokens per forward: as many as suit the device, or as `MEMORY_BUDGET` holds if those are fewer, at least 1.

        bytes per token = 4 (4 hidden + 3 intermediate + 8 heads * head size + 2 layers * key heads * head size)

    counts what lives at once in float32: the residual stream, the MLP's gate, up and product, queries, keys, values
    and the parts of the attention that are merged, and the trajectory's stored keys and values. A single trajectory
    is one forward whatever its length. An accelerator that isn't listed is taken for a GPU.

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


def interpolate(values: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
    """(length + 1,) from values (J,) at positions (J,): linear in between, constant after the last."""
    t = torch.arange(length + 1).clamp(max=int(positions[-1]))
    right = torch.searchsorted(positions, t)
    left = (right - 1).clamp(min=0)
    fraction = (t - positions[left]) / (positions[right] - positions[left]).clamp(min=1)
    return values[left] + (values[right] - values[left]) * fraction


def _unpad(
    model,
    input_ids,
    attention_mask,
    response_mask,
    probe_ids,
    chunk_size,
    stride,
    boundaries,
    max_gap,
    answers,
    max_tokens,
) -> tuple[torch.Tensor, list[Completion]]:
    """The probe's tokens and the rows of a padded batch, on the CPU.

    Everything that can be wrong is found here, before the first forward: a rank that raises later hangs the others.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: shape {tuple(input_ids.shape)} must be (B, S).")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)} must equal input_ids' (B, S) = "
            f"{tuple(input_ids.shape)}."
        )
    B, S = input_ids.shape
    if response_mask.ndim != 2 or response_mask.shape[0] != B or response_mask.shape[1] > S:
        raise ValueError(f"response_mask: shape {tuple(response_mask.shape)} must be (B, T) with B = {B}, T <= {S}.")
    for name, mask in (("attention_mask", attention_mask), ("response_mask", response_mask)):
        others = mask[(mask != 0) & (mask != 1)]
        if len(others):
            raise ValueError(f"{name}: holds {others[0].item()}; it must be 0 or 1 everywhere.")
    attended = attention_mask.bool()
    T = response_mask.shape[1]
    prompt, response = attended[:, : S - T], attended[:, S - T :]
    if (prompt[:, :-1] & ~prompt[:, 1:]).any() or not prompt.any(1).all():
        raise ValueError("attention_mask: prompts must be left-padded and have at least one token.")
    if (~response[:, :-1] & response[:, 1:]).any():
        raise ValueError("attention_mask: responses must be right-padded.")
    if (response_mask.bool() & ~response).any():
        raise ValueError("response_mask: marks padding as valid; it must be 0 wherever attention_mask is 0.")
    probe_ids = torch.as_tensor(probe_ids).long().cpu()
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if probe_ids.ndim != 1 or len(probe_ids) == 0 or probe_ids.min() < 0 or probe_ids.max() >= vocabulary:
        raise ValueError(f"probe_ids: {probe_ids.tolist()} must be a non-empty list of ids of 0 to {vocabulary - 1}.")
    unknown = input_ids[attended & ((input_ids < 0) | (input_ids >= vocabulary))]
    if len(unknown):
        raise ValueError(f"input_ids: {unknown[0].item()} must be one of the model's 0 to {vocabulary - 1}.")
    for name, value in (
        ("stride", stride),
        ("max_gap", max_gap),
        ("chunk_size", chunk_size),
        ("max_tokens", max_tokens),
    ):
        if not (value is None and name in ("chunk_size", "max_tokens")) and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: {value!r} must be an integer of at least 1.")
    if boundaries is not None and boundaries.shape != response_mask.shape:
        raise ValueError(
            f"boundaries: shape {tuple(boundaries.shape)} must be response_mask's {tuple(response_mask.shape)}."
        )
    if answers is not None and len(answers) != B:
        raise ValueError(f"answers: {len(answers)} of them for {B} completions; give one each.")
    answers = None if answers is None else [torch.as_tensor(answer).long().cpu() for answer in answers]
    for answer in answers or ():
        if answer.ndim != 1 or (len(answer) and not 0 <= int(answer.min()) <= int(answer.max()) < vocabulary):
            raise ValueError(f"answers: {answer.tolist()} must be a list of ids of 0 to {vocabulary - 1}.")
    completions = []
    attended, lengths, ids = attended.cpu(), _last_valid(response_mask).tolist(), input_ids.cpu()
    for b in range(B):
        positions = probe_positions(lengths[b], stride, None if boundaries is None else boundaries[b].cpu(), max_gap)
        answer = None if answers is None else answers[b]
        completions.append(Completion(ids[b, : S - T][attended[b, : S - T]], ids[b, S - T :], positions, answer))
    return probe_ids, completions


def _last_valid(response_mask: torch.Tensor) -> torch.Tensor:
    """(B,) number of response tokens up to and including the last valid one."""
    ends = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    return F.pad(response_mask.long() * ends, (1, 0)).amax(1)


def _check_entropy_shape(exit_entropy: torch.Tensor, response_mask: torch.Tensor) -> None:
    B, T = response_mask.shape
    if exit_entropy.shape != (B, T + 1):
        raise ValueError(f"exit_entropy: shape {tuple(exit_entropy.shape)} must be (B, T + 1) = {(B, T + 1)}.")
