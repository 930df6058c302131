"""Cascade attention: many short probes over one shared copy of their trajectories' keys and values.

A model's attention is replaced, by Hugging Face's attention interface, for packed forwards of two kinds: one of whole
trajectories, whose keys and values are kept, and then any number of probe forwards that read them. A query's keys come
in parts: stored ranges that its whole block sees, a stored range of which each probe sees a prefix, and its own probe.
Every part is computed densely, without a mask where none is needed, and gives an output o_k and the log of its softmax
denominator l_k; the parts are merged exactly:

    o = sum_k exp(l_k - l) o_k,     l = log sum_k exp(l_k)

So nothing is copied per position, no T x T mask exists and little masked-out work is done. The merge is the one of
FlashAttention and of cascade inference; `attend_naive` and the tests' plain forward are the references.

Shape suffixes: H heads, K key heads, G = H / K heads per key head, N queries, M keys, D head size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from transformers import AttentionInterface

IMPLEMENTATION = "iapo_cascade"


class Range(NamedTuple):
    """Consecutive queries of a forward and some of the keys that they see.

    Attributes:
        queries: their place in the forward.
        keys: a range of the stored keys; None: their own, of which each run of `width` queries sees itself, causally.
        width: the queries are runs of this many tokens.
        visible: (runs,) how many of `keys` each run sees, from the first; None: every query sees all of them.
    """

    queries: slice
    keys: slice | None
    width: int
    visible: torch.Tensor | None = None


# Ranges of disjoint queries; what the parts say of one query is merged.
Part = Sequence[Range]


class Cascade:
    """The keys and values of one forward of trajectories, and who sees what in the forward at hand."""

    def __init__(self, ignores_softcap: bool):
        self.stored: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self.parts: Sequence[Part] = ()
        self.storing = True
        self._ignores_softcap = ignores_softcap
        self._masks: dict[int, torch.Tensor] = {}

    def start(self, parts: Sequence[Part], storing: bool) -> None:
        """Before a forward: who sees what in it, and whether its keys and values are the ones to keep."""
        self.parts, self.storing = parts, storing
        self._masks.clear()
        if storing:
            self.stored.clear()

    def check(self, model) -> None:
        """After a forward of trajectories: refuse a model some of whose layers attended in a way of their own.

        Raises:
            ValueError: not every layer called this attention.
        """
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if len(self.stored) != layers:
            raise ValueError(
                f"model: {len(self.stored)} of the {layers} layers of {type(model).__name__} use transformers' "
                "attention interface; the exit-entropy pass needs all of them to."
            )

    def attend(self, module, query, key, value, scale, softcap) -> torch.Tensor:
        """(N, H, D) outputs for the queries (H, N, D) of one layer, whose own keys and values are (K, N, D)."""
        if self.storing:
            self.stored[module] = (key, value)
        stored_key, stored_value = self.stored[module]
        softcap = None if self._ignores_softcap else softcap

        def attend_range(r: Range):
            q = query[:, r.queries]
            if r.keys is None:
                return _attend_own(q, key[:, r.queries], value[:, r.queries], r.width, scale, softcap)
            k, v = stored_key[:, r.keys], stored_value[:, r.keys]
            if r.visible is None:
                return _attend_shared(q, k, v, scale, softcap)
            out, lse = _attend_shared(q, k, v, scale, softcap, self._mask(r, q))
            return out, lse.masked_fill((r.visible == 0).repeat_interleave(r.width).to(lse.device), -math.inf)

        merged = []
        for part in self.parts:
            if len(part) == 1 and part[0].queries == slice(0, query.shape[1]):
                merged.append(attend_range(part[0]))
                continue
            out = query.new_zeros(*query.shape[:2], value.shape[-1])
            lse = query.new_full(query.shape[:2], -math.inf, dtype=torch.float32)  # no key, no weight
            for r in part:
                out[:, r.queries], lse[:, r.queries] = attend_range(r)
            merged.append((out, lse))
        return merge(merged).to(value.dtype).transpose(0, 1)

    def _mask(self, r: Range, q: torch.Tensor) -> torch.Tensor:
        """(N, M) additive mask of a range with `visible`; the same in every layer."""
        if r.queries.start not in self._masks:
            # A query without any key would give NaN; it sees one, and gets no weight.
            visible = r.visible.clamp(min=1).to(q.device)
            hidden = torch.arange(r.keys.stop - r.keys.start, device=q.device) >= visible[:, None]
            mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, -math.inf)
            self._masks[r.queries.start] = mask.repeat_interleave(r.width, 0)
        return self._masks[r.queries.start]


def attend(q, k, v, scale: float, softcap: float | None = None, causal: bool = False, mask=None):
    """Attention and the log of its denominator: (B, H, N, D) and (B, H, N), by the device's flash kernel if it can.

    Args:
        q: (B, H, N, D). k, v: (B, H, M, D).
        causal: query n sees keys 0..n.
        mask: (N, M) additive, in q's dtype.
    """
    plain = softcap is None and q.shape[-1] == v.shape[-1]
    if plain and q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    if plain and mask is None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return attend_naive(q, k, v, scale, softcap, causal, mask)


def attend_naive(q, k, v, scale: float, softcap: float | None = None, causal: bool = False, mask=None):
    """The reference of `attend`: every score in memory."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is not None:
        scores = scores + mask.float()
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def merge(parts) -> torch.Tensor:
    """(..., N, D) attention over all keys from parts [(output (..., N, D), log of its denominator (..., N)), ...]."""
    weights = torch.stack([lse.float() for _, lse in parts]).softmax(0)[..., None]
    total = parts[0][0] * weights[0]  # float32, as the weights are
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(out.float(), weight)
    return total


@contextmanager
def cascade_attention(model) -> Iterator[Cascade]:
    """Let `model` attend by the blocks of the Cascade that this yields; its own attention is put back at the end.

    Raises:
        ValueError: the model doesn't use Hugging Face's attention interface.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:  # transformers only warns where it can't switch
        raise ValueError(f"model: {type(model).__name__} has an attention of its own that can't be replaced.")
    # Transformers' SDPA attention takes no softcap and drops it in silence; a model that trains so is measured so.
    cascade = Cascade(ignores_softcap=before == "sdpa")
    token = _CURRENT.set(cascade)
    try:
        yield cascade
    finally:
        _CURRENT.reset(token)
        model.set_attn_implementation(before)


_CURRENT: ContextVar[Cascade] = ContextVar("cascade")


def _interface(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
    """The signature of transformers' attention functions; the batch is one packed row."""
    if s_aux is not None:
        raise ValueError(f"model: {type(module).__name__} has attention sinks, which the exit-entropy pass lacks.")
    dtype = value.dtype
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _CURRENT.get().attend(module, query[0].to(dtype), key[0].to(dtype), value[0], scale, softcap)
    return output[None], None


AttentionInterface.register(IMPLEMENTATION, _interface)


def _attend_own(q, k, v, width: int, scale, softcap):
    """Queries (H, N, D) over their own keys (K, N, D), in runs of `width` that don't see each other."""
    group = len(q) // len(k)

    def runs(x):  # (runs, H, width, D)
        return x.unflatten(1, (-1, width)).transpose(0, 1)

    if group > 1:
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    out, lse = attend(runs(q), runs(k), runs(v), scale, softcap, causal=True)
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)


def _attend_shared(q, k, v, scale, softcap, mask=None):
    """Queries (H, N, D) over the same keys (K, M, D): the G heads of a key head are queries of one call."""
    heads, queries, _ = q.shape
    group = heads // len(k)
    folded = q.reshape(1, len(k), group * queries, -1)
    mask = mask.repeat(group, 1) if mask is not None else None
    out, lse = attend(folded, k[None], v[None], scale, softcap, mask=mask)
    return out.reshape(heads, queries, -1), lse.reshape(heads, queries)
