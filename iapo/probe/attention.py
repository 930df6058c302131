"""Cascade attention: many short probes over one shared copy of their trajectories' keys and values.

A model's attention is replaced, by Hugging Face's attention interface, for packed forwards: a first one of whole
trajectories, whose keys and values are kept, and of as many probes as have room in it, then any number of forwards of
probes that read them. A query's keys come in parts: ranges of the trajectories that its whole block sees, a range of
which each probe sees a prefix, and its own probe.
Every part is computed densely, without a mask where none is needed, and gives an output o_k and the log of its softmax
denominator l_k; the parts are merged exactly:

    o = sum_k exp(l_k - l) o_k,     l = log sum_k exp(l_k)

The prefixes of probes at consecutive positions make a causal attention of the probes' first tokens, one of their second
tokens, and so on; those of others stand behind small masks. So nothing is copied per position, and little masked-out
work is done. The merge is the one of FlashAttention and of cascade inference; `attend_naive` and the tests' plain
forward are the references.

Behind the last layer's attention no token sees another, and only the scored ones' logits are asked for. So there the
others' attention to stored keys and, where it is made of linear layers, their MLP are left out; of trajectories, whose
keys and values alone count, all of it is.

The keys and values may also be those of a forward that somebody else makes of the same trajectories, see
`captured_attention`.

Shape suffixes: H heads, K key heads, G = H / K heads per key head, N queries, M keys, D head size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "iapo_cascade"

# Tokens of a run up to which the heads of a key head share its keys in one masked call, instead of each having a copy.
SHORT_RUN = 64
# Float32 scores that `attend_naive` holds at a time (64 MB).
SCORES_AT_A_TIME = 2**24


class Range(NamedTuple):
    """Consecutive queries of a forward and some of the keys that they see.

    Attributes:
        queries: their place in the forward.
        keys: a range of the trajectories', which every query sees all of if neither `visible` nor `staircase` is given;
            None: their own, of which each run of `width` queries sees itself, causally.
        width: the queries are runs of this many tokens.
        visible: (runs,) how many of `keys` each run sees, from the first, at least one.
        staircase: there are as many runs as `keys`, and run n sees the keys 0..n.
    """

    queries: slice
    keys: slice | None
    width: int
    visible: torch.Tensor | None = None
    staircase: bool = False


# Ranges of disjoint queries; what the parts say of one query is merged.
Part = Sequence[Range]

# (K, M, D) keys and (K, M, D) values of every attention module, of one packed row of tokens.
KeysAndValues = dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]


class Cascade:
    """The keys and values of trajectories, and who sees what in the forward at hand."""

    def __init__(self, model, ignores_softcap: bool):
        self.stored: KeysAndValues = {}
        self._model, self._ignores_softcap = model, ignores_softcap
        self._layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._parts: Sequence[Part] = ()
        self._stores = 0
        self._scored: torch.Tensor | None = None
        self._scored_there: torch.Tensor | None = None  # on the model's device
        self._undo = ExitStack()
        self._masks: dict[int, torch.Tensor] = {}

    def run(self, token_ids, position_ids, parts: Sequence[Part], scored: torch.Tensor | None, stores: int = 0):
        """The model's output for one packed row (N,) of tokens.

        Args:
            parts: who sees what.
            scored: (M,) increasing, on the CPU: the tokens whose logits are asked for; None: of none.
            stores: the first tokens of the row are those of trajectories, this many, whose keys and values are kept;
                0: they have been.

        Raises:
            ValueError: not every layer called this attention.
        """
        self._parts, self._scored, self._stores = parts, scored, stores
        self._scored_there = None if scored is None else scored.to(token_ids.device)
        self._masks.clear()
        if stores:
            self.stored.clear()
        with self._undo:
            output = self._model(
                input_ids=token_ids[None],
                position_ids=position_ids[None],
                use_cache=False,
                logits_to_keep=1 if scored is None else self._scored_there,
            )
        if len(self.stored) != self._layers:
            raise ValueError(
                f"model: {len(self.stored)} of the {self._layers} layers of {type(self._model).__name__} use "
                "transformers' attention interface; the exit-entropy pass needs all of them to, or none."
            )
        return output

    def attend(self, module, query, key, value, scale, softcap) -> torch.Tensor:
        """(N, H, D) outputs for the queries (H, N, D) of one layer, whose own keys and values are (K, N, D).

        Of the last layer those of the scored tokens; anything for the others.
        """
        queries = query.shape[1]
        if self._stores:
            self.stored[module] = _alone(key[:, : self._stores]), _alone(value[:, : self._stores])
        stored_key, stored_value = self.stored[module]
        softcap = None if self._ignores_softcap else softcap
        last = len(self.stored) == self._layers and module is next(reversed(self.stored))
        if last:
            nothing = torch.arange(queries - 1, queries, device=query.device)  # one row, for shapes' sake
            rows = nothing if self._scored is None else self._scored_there
            for sibling in _siblings_by_token(self._model, module):  # for the rest of this run
                self._undo.enter_context(replaced_forward(sibling, _limited_to(rows, queries, sibling.forward)))
            if self._scored is None:
                return query.new_zeros(queries, len(query), value.shape[-1])

        def attend_range(r: Range, rows: slice | torch.Tensor):
            q = query[:, rows]
            if r.keys is None:
                return _attend_own(q, key[:, rows], value[:, rows], r.width, scale, softcap)
            k, v = stored_key[:, r.keys], stored_value[:, r.keys]
            if r.staircase:
                return _attend_staircase(q, k, v, scale, softcap)
            mask = None if r.visible is None else self._mask(r, q)
            if mask is not None and last:
                mask = mask[rows - r.queries.start]
            return _attend_shared(q, k, v, scale, softcap, mask)

        merged = []
        for part in self._parts:
            if len(part) == 1 and part[0].queries == slice(0, queries) and not last:
                merged.append(attend_range(part[0], part[0].queries))
                continue
            out = query.new_zeros(*query.shape[:2], value.shape[-1])
            lse = query.new_full(query.shape[:2], -math.inf, dtype=torch.float32)  # no key, no weight
            for r in part:
                rows = self._scored_of(r) if last else r.queries
                if last and len(rows) == 0:
                    if r.keys is None:
                        lse[:, r.queries] = 0  # what nobody reads is 0, not NaN, which would spread in a statistic
                    continue
                rows = r.queries if r.keys is None else rows
                own_out, own_lse = attend_range(r, rows)
                out[:, rows], lse[:, rows] = own_out.to(out.dtype), own_lse.to(lse.dtype)
            merged.append((out, lse))
        return merge(merged).to(value.dtype).transpose(0, 1)

    def _scored_of(self, r: Range) -> torch.Tensor:
        first, end = torch.searchsorted(self._scored, torch.tensor([r.queries.start, r.queries.stop])).tolist()
        return self._scored_there[first:end]

    def _mask(self, r: Range, q: torch.Tensor) -> torch.Tensor:
        """(N, M) additive mask of a range with `visible`, the same in every layer."""
        if r.queries.start not in self._masks:
            visible = r.visible.repeat_interleave(r.width).to(q.device)
            hidden = torch.arange(r.keys.stop - r.keys.start, device=q.device) >= visible[:, None]
            mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, -math.inf)
            self._masks[r.queries.start] = mask
        return self._masks[r.queries.start]


class MaskedAttention:
    """The same for a model whose attention can't be replaced: its own, with a 4-D mask and a key-value cache.

    Everything masked out is computed too, and a forward holds a mask of its tokens times all that they could see.
    """

    def __init__(self, model):
        self._model, self._cache = model, None

    def run(self, token_ids, position_ids, parts: Sequence[Part], scored: torch.Tensor | None, stores: int = 0):
        """As `Cascade.run`."""
        if stores:
            self._cache = DynamicCache()  # plain layers: a sliding-window layer would drop keys
        stored = self._cache.get_seq_length()
        seen = visibility(parts, len(token_ids), stored).to(token_ids.device)[None, None]
        if self._model.config._attn_implementation == "eager":
            seen = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)
        output = self._model(
            input_ids=token_ids[None],
            position_ids=position_ids[None],
            attention_mask=seen,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if scored is None else scored.to(token_ids.device),
        )
        self._cache.crop(stores or stored)
        return output


def bounds(parts: Sequence[Part], queries: int, stored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(len(parts), N) the first key that each part lets a query see, and the one behind the last; 0 and 0: none.

    The stored keys are counted first, then the forward's own; without stored ones the trajectories' are its first.
    """
    first, end = torch.zeros(2, len(parts), queries, dtype=torch.long)
    n = torch.arange(queries)
    for part, first_N, end_N in zip(parts, first, end, strict=True):
        for r in part:
            if r.keys is None:
                own = stored + n[r.queries]
                first_N[r.queries], end_N[r.queries] = own - (own - own[0]) % r.width, own + 1
            else:
                size = r.keys.stop - r.keys.start
                visible = torch.arange(1, size + 1) if r.staircase else r.visible
                visible = size if visible is None else visible.repeat_interleave(r.width)
                first_N[r.queries], end_N[r.queries] = r.keys.start, r.keys.start + visible
    return first, end


def visibility(parts: Sequence[Part], queries: int, stored: int) -> torch.Tensor:
    """(N, stored + N) which stored keys, and then which of the forward's own, a query sees."""
    keys = torch.arange(stored + queries)
    seen = torch.zeros(queries, len(keys), dtype=torch.bool)
    for first_N, end_N in zip(*bounds(parts, queries, stored), strict=True):
        seen |= (keys >= first_N[:, None]) & (keys < end_N[:, None])
    return seen


def attend(q, k, v, scale: float, softcap: float | None = None, causal: bool = False, mask=None):
    """Attention and the log of its denominator: (B, H, N, D) and (B, H, N), if possible by a kernel of the
    device that doesn't hold the scores.

    Args:
        q: (B, H, N, D). k, v: (B, H, M, D), or (1, H, M, D), the same for all B.
        causal: query n sees keys 0..n.
        mask: (N, M) additive, in q's dtype.
    """
    plain = softcap is None and q.shape[-1] == v.shape[-1]
    on_gpu = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    expanded = [x.expand(len(q), -1, -1, -1) for x in (k, v)]
    if plain and q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, *expanded, 0.0, causal, attn_mask=mask, scale=scale
        )
    if plain and on_gpu and torch.cuda.get_device_capability(q.device) >= (8, 0):
        if mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, *expanded, 0.0, causal, False, scale=scale)[:2]
        # This kernel wants a mask whose rows start at multiples of 16, and fills up the denominators of 32 queries.
        bias = F.pad(mask, (0, -k.shape[2] % 16)).narrow(1, 0, k.shape[2]).expand(*q.shape[:2], -1, -1)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, *expanded, bias, True, scale=scale)
        return out, lse.narrow(2, 0, q.shape[2])
    return attend_naive(q, k, v, scale, softcap, causal, mask)


def attend_naive(q, k, v, scale: float, softcap: float | None = None, causal: bool = False, mask=None):
    """The reference of `attend`, in float32, some queries after the other so that few scores exist at a time."""
    queries, keys = q.shape[-2], k.shape[-2]
    rows = max(SCORES_AT_A_TIME // (q.shape[0] * q.shape[1] * keys), 1)
    results = []
    with torch.autocast(q.device.type, enabled=False):
        k, v, axes = (k[0].float(), v[0].float(), "hmd") if len(k) == 1 else (k.float(), v.float(), "bhmd")
        for some in torch.arange(queries, device=q.device).split(rows):
            scores = torch.einsum(f"bhnd,{axes}->bhnm", q[..., some, :].float(), k) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if causal:
                scores = scores.masked_fill(torch.arange(keys, device=q.device) > some[:, None], -math.inf)
            if mask is not None:
                scores = scores + mask[some].float()
            results.append((torch.einsum(f"bhnm,{axes}->bhnd", scores.softmax(-1), v), scores.logsumexp(-1)))
    outputs, lses = zip(*results, strict=True)
    return torch.cat(outputs, -2), torch.cat(lses, -1)


def merge(parts) -> torch.Tensor:
    """(..., N, D) attention over all keys from parts [(output (..., N, D), log of its denominator (..., N)), ...]."""
    weights = torch.stack([lse.float() for _, lse in parts]).softmax(0)[..., None]
    total = parts[0][0] * weights[0]  # float32, as the weights are
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(out, weight)
    return total


@contextmanager
def cascade_attention(model) -> Iterator[Cascade | MaskedAttention]:
    """Something whose `run` runs `model` with the attention of given parts; its own is put back at the end."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        if model.config._attn_implementation == IMPLEMENTATION:
            # Transformers' SDPA drops a softcap in silence; a model that trains so is measured so.
            cascade = Cascade(model, ignores_softcap=before == "sdpa")
            token = _CURRENT.set(cascade)
            try:
                yield cascade
            finally:
                _CURRENT.reset(token)
        else:  # transformers only warns where it can't switch
            yield MaskedAttention(model)
    finally:
        model.set_attn_implementation(before)


def can_capture(model) -> bool:
    """Whether `captured_attention` serves a model: its attention can be switched and has a name, unlike eager's."""
    name = model.config._attn_implementation
    with cascade_attention(model) as attention:
        return isinstance(attention, Cascade) and name in ALL_ATTENTION_FUNCTIONS


@contextmanager
def captured_attention(model) -> Iterator[KeysAndValues]:
    """The keys and values of the forward of one packed row that runs inside, which itself stays as it is.

    Only the function that the name of the model's attention stands for is wrapped; the name, on which masks and much
    else depend, does not change.
    """
    stored: KeysAndValues = {}
    name = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS[name]

    def keeping(module, query, key, value, *args, **kwargs):
        stored[module] = _alone(key[0].to(value.dtype)), _alone(value[0])
        return original(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = keeping
    try:
        yield stored
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # the local one, which hid the one that is registered for all
        if ALL_ATTENTION_FUNCTIONS.get(name) is not original:  # another local one had been there
            ALL_ATTENTION_FUNCTIONS[name] = original


def _alone(x: torch.Tensor) -> torch.Tensor:
    """A model with one projection for all three gives views of it, which would keep the whole alive."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """Let this instance of a module be called as `forward`; its own is put back at the end."""
    original = module.forward
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the instance's, which hid the class's
        if module.forward != original:  # somebody else's had been there
            module.forward = original


def _siblings_by_token(model, attention: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules beside an attention in its layer all of whose parameters are those of linear layers: MLPs, which take
    every token by itself."""
    layer = next((m for m in model.modules() if any(child is attention for child in m.children())), None)
    found = []
    for sibling in [] if layer is None else layer.children():
        linear = {p for m in sibling.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters(recurse=False)}
        if sibling is not attention and linear and linear == set(sibling.parameters()):
            found.append(sibling)
    return found


def _limited_to(rows: torch.Tensor, tokens: int, forward: Callable) -> Callable:
    """`forward` of a module that takes every token by itself, for these rows of its input (1, tokens, D) alone; the
    others give 0. As it is where it is called in another way or doesn't give a tensor."""

    def limited(x, *args, **kwargs):
        if args or kwargs or x.dim() != 3 or x.shape[:2] != (1, tokens):
            return forward(x, *args, **kwargs)
        out = forward(x[:, rows])
        if not isinstance(out, torch.Tensor) or out.shape[:2] != (1, len(rows)):
            return forward(x)
        return out.new_zeros(1, tokens, out.shape[-1]).index_copy_(1, rows, out)

    return limited


_CURRENT: ContextVar[Cascade] = ContextVar("cascade")


def _interface(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
    """The signature of transformers' attention functions; the batch is one packed row."""
    name = type(module).__name__
    if s_aux is not None:
        raise ValueError(f"model: {name} has attention sinks, which the exit-entropy pass lacks.")
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ValueError(f"model: {name} makes masks or keys of its own, which the exit-entropy pass doesn't know.")
    dtype = value.dtype
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _CURRENT.get().attend(module, query[0].to(dtype), key[0].to(dtype), value[0], scale, softcap)
    return output[None].contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _interface)


def _attend_own(q, k, v, width: int, scale, softcap):
    """Queries (H, N, D) over their own keys (K, N, D), in runs of `width` that don't see each other."""
    group = len(q) // len(k)
    q, k, v = (x.unflatten(1, (-1, width)).transpose(0, 1) for x in (q, k, v))  # runs, H or K, width, D
    if group > 1 and width <= SHORT_RUN:
        mask = torch.full((width, width), -math.inf, dtype=q.dtype, device=q.device).triu(1).repeat(group, 1)
        folded = q.unflatten(1, (-1, group)).flatten(2, 3)  # runs, K, G width, D
        out, lse = attend(folded, k, v, scale, softcap, mask=mask)
        out, lse = (x.unflatten(2, (group, width)).flatten(1, 2) for x in (out, lse))
    else:
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out, lse = attend(q, k, v, scale, softcap, causal=True)
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)


def _attend_shared(q, k, v, scale, softcap, mask=None):
    """Queries (H, N, D) over the same keys (K, M, D), of which a mask (N, M) hides some.

    Without one the G heads of a key head are queries of one call; with one it would have to be G times as long.
    """
    shape = len(k), len(q) // len(k), q.shape[1]  # K, G, N
    if mask is None:
        out, lse = attend(q.reshape(1, shape[0], -1, q.shape[2]), k.unsqueeze(0), v.unsqueeze(0), scale, softcap)
    else:
        k, v = (x.unsqueeze(1).expand(-1, shape[1], -1, -1) for x in (k, v))
        out, lse = attend(q.unflatten(0, shape[:2]), k, v, scale, softcap, mask=mask)
    return out.reshape(*q.shape[:2], -1), lse.reshape(q.shape[:2])


def _attend_staircase(q, k, v, scale, softcap):
    """Queries (H, M runs, D), run n of which sees the keys 0..n of (K, M, D): every token of the runs and every one of
    the G heads of a key head is a causal attention of its own, so that nothing is computed to be masked out."""
    key_heads, keys, _ = v.shape
    group, width = len(q) // key_heads, q.shape[1] // keys
    folded = q.unflatten(1, (keys, width)).unflatten(0, (key_heads, group))  # K, G, M, width, D
    folded = folded.permute(1, 3, 0, 2, 4).flatten(0, 1)
    out, lse = attend(folded, k.unsqueeze(0), v.unsqueeze(0), scale, softcap, causal=True)
    out = out.unflatten(0, (group, width)).permute(2, 0, 3, 1, 4)  # K, G, M, width, D
    lse = lse.unflatten(0, (group, width)).permute(2, 0, 3, 1)
    return out.flatten(2, 3).flatten(0, 1), lse.flatten(2, 3).flatten(0, 1)
