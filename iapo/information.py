"""How much does each token tell about the final answer? Early-exit entropies, their gains and their rate.

Shape suffixes used throughout the package:
    B completions, T response tokens, S prompt + response columns, P probe tokens, J probed positions,
    C positions of one chunk, V vocabulary.

Source: "IAPO: Information-Aware Policy Optimization for Token-Efficient Reasoning" (arXiv 2602.19049), the section
on the early-exit estimate of the conditional entropy, with its two savings: one forward of the whole trajectory
whose keys and values are kept, and many positions' probes per forward. Unlike the released code, nothing is copied
per position: the probes of a chunk are queries of ONE shared cache, told apart by position ids and a mask.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import DynamicCache

# fp32 copies of the output weight are made this many vocabulary rows at a time.
_VOCABULARY_SLICE = 16384


def exit_entropy(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
    probe_ids: Sequence[int] | torch.Tensor,
    *,
    chunk_size: int,
    stride: int = 1,
) -> torch.Tensor:
    r"""Entropy of the answer if the model had to answer now, after every response token.

        h_t = H(next token | prompt, o_1..o_t, probe),    t = 0..T      [nats]

    the entropy of the model's next-token distribution (temperature 1) after the exit probe is appended to the first
    t response tokens (arXiv 2602.19049, early-exit estimate). One forward fills a KV cache with the trajectory; then
    ceil(J / chunk_size) forwards push the probes of chunk_size positions each through the model. Probe j sees the
    prefix of its own position and its own earlier tokens, nothing else.

    Args:
        model: a Hugging Face causal LM in eval mode, rotary or learned positions, standard KV cache; also the root
            module of an FSDP model. Models that this method can't serve exactly are refused, see `check_model`.
        input_ids: (B, S) left-padded prompt, then right-padded response in the last T columns.
        attention_mask: (B, S) 1 on prompt and response tokens, 0 on padding.
        response_mask: (B, T) 1 on the tokens whose information is asked for. Nothing is probed after a row's last 1.
        probe_ids: the P tokens of the exit probe, e.g. of "</think>\n<answer>".
        chunk_size: positions probed per forward. Changes speed and memory, not the result.
        stride: probe positions 0, k, 2k, ... and each row's last one; h is linear between them, so the gain of a
            segment is spread evenly over its tokens and the sum of the gains is exact.

    Returns:
        (B, T + 1) float32, h_0 .. h_T in nats, constant after a row's last valid token. A row without a valid token
        holds h_0 everywhere. Logits and entropies are float32 whatever the dtype of the model.

    Raises:
        ValueError: malformed inputs or a model that can't be served; names the argument, its value and the fix.
    """
    probe_ids = _check_inputs(model, input_ids, attention_mask, response_mask, probe_ids, chunk_size, stride)
    positions_BJ = probe_positions(response_mask, stride)
    prompt_width = input_ids.shape[1] - response_mask.shape[1]
    width = prompt_width + int(positions_BJ.max())
    attention_mask = attention_mask.bool()
    check_model(model, int(attention_mask.sum(1).max()) + len(probe_ids))

    with torch.no_grad(), _maskable_attention(model) as additive_mask, _fp32_logits(model):
        cache = DynamicCache()  # plain layers: a sliding-window layer would drop keys
        model(
            input_ids=input_ids[:, :width],
            attention_mask=attention_mask[:, :width].long(),
            position_ids=_position_ids(attention_mask)[:, :width],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        entropies = []
        # From the last chunk to the first, so that cropping the cache drops the previous chunk's probe tokens.
        for chunk_BC in reversed(positions_BJ.split(chunk_size, dim=1)):
            cache.crop(prompt_width + int(chunk_BC.max()))
            entropies.append(
                _probe_chunk(model, cache, chunk_BC, attention_mask, prompt_width, probe_ids, additive_mask)
            )
    return _interpolate(torch.cat(entropies[::-1], dim=1), positions_BJ, response_mask.shape[1], stride)


def exit_entropy_naive(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
    probe_ids: Sequence[int] | torch.Tensor,
    *,
    chunk_size: int = 1,
    stride: int = 1,
) -> torch.Tensor:
    """The reference of `exit_entropy`: one plain forward per position, without cache, padding or mask.

    Same arguments, result and errors; `chunk_size` has no effect here.
    """
    probe_ids = _check_inputs(model, input_ids, attention_mask, response_mask, probe_ids, chunk_size, stride)
    T = response_mask.shape[1]
    h_BT1 = torch.zeros(len(input_ids), T + 1, device=input_ids.device)
    with torch.no_grad(), _fp32_logits(model):
        for b, (ids, attended) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            prompt = ids[:-T][attended[:-T]] if T else ids[attended]
            response = ids[len(ids) - T :]
            last = _last_valid(response_mask[b : b + 1]).item()
            probed = sorted({*range(0, last, stride), last})
            values = []
            for t in probed:
                sequence = torch.cat([prompt, response[:t], probe_ids])
                values.append(entropy(model(input_ids=sequence[None], use_cache=False).logits[0, -1]))
            for (left, h_left), (right, h_right) in zip(
                zip(probed[:-1], values[:-1], strict=True), zip(probed[1:], values[1:], strict=True), strict=True
            ):
                for t in range(left, right):
                    h_BT1[b, t] = h_left + (h_right - h_left) * (t - left) / (right - left)
            h_BT1[b, last:] = values[-1]
    return h_BT1


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


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H = logsumexp(z) - sum_v softmax(z)_v z_v in nats, over the last dimension, float32."""
    logits = logits.float()
    probabilities = logits.softmax(-1)
    # A logit of -inf has probability 0 and adds 0, not NaN.
    return logits.logsumexp(-1) - torch.where(probabilities > 0, probabilities * logits, 0.0).sum(-1)


def probe_positions(response_mask: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Response tokens in front of each probe: 0, k, 2k, ... and the last valid one; (B, J), rows end in repeats."""
    last_B1 = _last_valid(response_mask)[:, None]
    grid_J = torch.arange(0, max(int(last_B1.max()), 1), stride, device=response_mask.device)
    return torch.cat([torch.minimum(grid_J[None], last_B1), last_B1], dim=1)


def forward_count(response_mask: torch.Tensor, *, chunk_size: int, stride: int = 1) -> int:
    """Model forwards that `exit_entropy` makes: one for the cache and one per chunk. FSDP ranks must agree on it."""
    return 1 + math.ceil(probe_positions(response_mask, stride).shape[1] / chunk_size)


def check_model(model, length: int) -> None:
    """Refuse a model that would be silently wrong at `length` tokens (prompt + response + probe).

    Raises:
        ValueError: recurrent state, sliding or chunked attention shorter than `length`, no position ids (ALiBi),
            rotary frequencies that depend on the length, more tokens than learned positions, an encoder-decoder.
    """
    reason = unsupported(model.config, length)
    # FSDP1 and PEFT wrap the model in one whose own forward takes anything.
    unwrapped = getattr(model, "_fsdp_wrapped_module", model)
    unwrapped = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
    if reason is None and "position_ids" not in inspect.signature(unwrapped.forward).parameters:
        reason = "its forward takes no position_ids (ALiBi?), so probes can't be placed"
    if reason is None and getattr(unwrapped, "_is_stateful", False):
        reason = "it keeps a recurrent state instead of a KV cache"
    if reason is not None:
        raise ValueError(
            f"model: {type(model).__name__} can't serve the exit-entropy pass at {length} tokens: {reason}. "
            "Use a causal LM with full attention over the sequence, or set iapo.alpha=0 and iapo.rho=0."
        )


def unsupported(config, length: int) -> str | None:
    """Why a model with this Hugging Face config can't be probed at `length` tokens; None if it can."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if getattr(text, "alibi", False):
        return "it uses ALiBi positions"
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None)
    if getattr(text, "layer_types", None) is None and window is not None:
        layer_types = {"sliding_attention"}
    exotic = layer_types - {"full_attention", "sliding_attention"}
    if exotic:
        return f"it has layers of type {sorted(exotic)}, which keep no standard KV cache"
    if "sliding_attention" in layer_types and window is not None and window < length:
        return f"its sliding window of {window} tokens is shorter than the sequence"
    rope = getattr(text, "rope_parameters", None) or {}
    maximum = getattr(text, "max_position_embeddings", None)
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or maximum
        if original is not None and length > original:
            return f"its {rope['rope_type']} rotary frequencies change with the length beyond {original} tokens"
    if not rope and maximum is not None and length > maximum:
        return f"it has learned positions for {maximum} tokens only"
    return None


def _probe_chunk(model, cache, chunk_BC, attention_mask, prompt_width, probe_ids, additive_mask) -> torch.Tensor:
    """(B, C) entropies after the probes at the C positions; the probe tokens are appended to `cache`."""
    B, C = chunk_BC.shape
    P = len(probe_ids)
    end_BC = prompt_width + chunk_BC  # first column that the probe must not see
    columns = torch.arange(cache.get_seq_length(), device=chunk_BC.device)
    sees_prefix = (columns < end_BC[..., None]) & attention_mask[:, None, : len(columns)]
    sees_prefix = sees_prefix[:, :, None].expand(B, C, P, -1).reshape(B, C * P, -1)
    own = torch.ones(P, P, dtype=torch.bool, device=chunk_BC.device).tril()
    sees_own = torch.block_diag(*[own] * C).bool().expand(B, -1, -1)
    mask = torch.cat([sees_prefix, sees_own], dim=-1)[:, None]
    if additive_mask:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
    # The first probe token stands where the next response token would: at the number of tokens in its prefix.
    tokens_before = F.pad(attention_mask.cumsum(1), (1, 0)).gather(1, end_BC)
    position_ids = (tokens_before[..., None] + torch.arange(P, device=chunk_BC.device)).reshape(B, C * P)
    logits = model(
        input_ids=probe_ids.repeat(C).expand(B, -1),
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.arange(P - 1, C * P, P, device=chunk_BC.device),
    ).logits
    # One completion at a time: the temporaries of an entropy are as large as its logits.
    return torch.stack([entropy(logits_CV) for logits_CV in logits])


def _interpolate(h_BJ: torch.Tensor, positions_BJ: torch.Tensor, T: int, stride: int) -> torch.Tensor:
    """h at every t = 0..T from h at the probed positions: linear in between, constant after the last."""
    last_B1 = positions_BJ[:, -1:]
    t_BT1 = torch.minimum(torch.arange(T + 1, device=h_BJ.device)[None], last_B1)
    final = h_BJ.shape[1] - 1
    left = torch.where(t_BT1 < last_B1, t_BT1 // stride, final)
    right = torch.where((left + 1) * stride < last_B1, left + 1, final)
    start, end = positions_BJ.gather(1, left), positions_BJ.gather(1, right)
    fraction = (t_BT1 - start) / (end - start).clamp(min=1)
    h_left, h_right = h_BJ.gather(1, left), h_BJ.gather(1, right)
    return h_left + (h_right - h_left) * fraction


def _position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def _last_valid(response_mask: torch.Tensor) -> torch.Tensor:
    """(B,) number of response tokens up to and including the last valid one."""
    ends = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    return F.pad(response_mask.long() * ends, (1, 0)).amax(1)


@contextmanager
def _maskable_attention(model) -> Iterator[bool]:
    """Attention that takes a 4-D mask. Yields whether the mask must be additive (eager) instead of boolean (SDPA)."""
    before = model.config._attn_implementation
    if before in ("sdpa", "eager"):
        yield before == "eager"
        return
    model.set_attn_implementation("sdpa")
    if model.config._attn_implementation != "sdpa":  # transformers only warns where it can't switch
        raise ValueError(f"model: its attention {before!r} takes no 4-D mask and can't be switched to 'sdpa'.")
    try:
        yield False
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _fp32_logits(model) -> Iterator[None]:
    """Make the output layer return float32 logits from its (possibly bf16) inputs and weights.

    bf16 logits alone move an entropy over a 152k vocabulary by hundredths of a nat, as much as most tokens gain. A
    forward hook is the one place where an FSDP model holds the whole output weight.
    """

    def fp32_linear(layer, args, output):
        if output.dtype == torch.float32:
            return output
        with torch.autocast(output.device.type, enabled=False):
            hidden = args[0].float()
            logits = torch.empty_like(output, dtype=torch.float32)
            for rows in torch.arange(len(layer.weight)).split(_VOCABULARY_SLICE):
                part = slice(rows[0], rows[-1] + 1)
                logits[..., part] = F.linear(hidden, layer.weight[part].float())
            return logits if layer.bias is None else logits.add_(layer.bias.float())

    handle = model.get_output_embeddings().register_forward_hook(fp32_linear)
    try:
        yield
    finally:
        handle.remove()


def _check_inputs(model, input_ids, attention_mask, response_mask, probe_ids, chunk_size, stride) -> torch.Tensor:
    """Everything that can be wrong is found here, before the first forward: a rank that raises later hangs others."""
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)} must equal input_ids' (B, S) = "
            f"{tuple(input_ids.shape)}."
        )
    B, S = input_ids.shape
    if response_mask.ndim != 2 or response_mask.shape[0] != B or response_mask.shape[1] > S:
        raise ValueError(f"response_mask: shape {tuple(response_mask.shape)} must be (B, T) with B = {B}, T <= {S}.")
    attended = attention_mask.bool()
    T = response_mask.shape[1]
    prompt, response = attended[:, : S - T], attended[:, S - T :]
    if (prompt[:, :-1] & ~prompt[:, 1:]).any() or not prompt.any(1).all():
        raise ValueError("attention_mask: prompts must be left-padded and have at least one token.")
    if (~response[:, :-1] & response[:, 1:]).any():
        raise ValueError("attention_mask: responses must be right-padded.")
    if (response_mask.bool() & ~response).any():
        raise ValueError("response_mask: marks padding as valid; it must be 0 wherever attention_mask is 0.")
    probe_ids = torch.as_tensor(probe_ids, device=input_ids.device).long()
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if probe_ids.ndim != 1 or len(probe_ids) == 0 or probe_ids.min() < 0 or probe_ids.max() >= vocabulary:
        raise ValueError(f"probe_ids: {probe_ids.tolist()} must be a non-empty list of ids below {vocabulary}.")
    for name, value in (("chunk_size", chunk_size), ("stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {value!r} must be an integer of at least 1.")
    if model.training:
        raise ValueError("model: in training mode, where dropout would blur the entropies; call model.eval() first.")
    return probe_ids


def _check_entropy_shape(exit_entropy: torch.Tensor, response_mask: torch.Tensor) -> None:
    B, T = response_mask.shape
    if exit_entropy.shape != (B, T + 1):
        raise ValueError(f"exit_entropy: shape {tuple(exit_entropy.shape)} must be (B, T + 1) = {(B, T + 1)}.")
