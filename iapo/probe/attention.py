"""Cascade attention: many short probes read one shared copy of their trajectories' keys and values.

A model's attention is replaced through Hugging Face's attention interface while packed forwards run. The first forward
of a pack has whole trajectories, whose keys and values are kept, and as many probes as fit. The others have probes
only, which read those keys and values.

The keys that a query sees come in parts: ranges of the trajectories that its whole block sees, a range of which each
probe sees a prefix, and its own probe. Every part is computed densely, with a mask only where one is needed. It gives
an output o_k and the log of its softmax denominator l_k. The parts are merged exactly:

    o = sum_k exp(l_k - l) o_k,     l = log sum_k exp(l_k)

The merge is the one of FlashAttention and of cascade inference. `attend_naive` and the tests' plain forwards are the
references.

Prefixes of probes at consecutive positions need no mask: the probes' first tokens are one causal attention, their
second tokens another, and so on. Those of probes at other positions have small masks. So nothing is copied per
position, and little work is masked out.

After the last layer's attention no token depends on another, and only the scored tokens' logits are asked for. So in
that layer the other probe tokens skip the attention to stored keys, and the MLP where it consists of linear layers.
Trajectory tokens skip all of the attention and the same MLP: only their keys and values are used.

The keys and values may also come from a forward of the same trajectories that the caller makes, see
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

# Up to this many tokens per run, the heads of a key head share its keys in one masked call. For longer runs each head
# gets a copy of the keys instead.
SHORT_RUN = 64
# Float32 scores that `attend_naive` holds at a time (64 MB).
SCORES_AT_A_TIME = 2**24

# (K, M, D) keys and (K, M, D) values of every attention module, of one packed row of tokens.
KeysAndValues = dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]


class KeyRange(NamedTuple):
    """Consecutive queries of a forward and some of the keys that they see.

    Attributes:
        queries: where they are in the forward.
        keys: a range of the stored keys. Every query sees all of it unless `visible` or `staircase` says otherwise.
            None: the queries' own keys; each run of `width` queries sees itself, causally.
        width: the queries are runs of this many tokens.
        visible: (runs,) how many of `keys` each run sees, counted from the first; at least one.
        staircase: there are as many runs as `keys`, and run n sees the keys 0..n.
    """

    queries: slice
    keys: slice | None
    width: int
    visible: torch.Tensor | None = None
    staircase: bool = False


# Ranges of disjoint queries. A query's results of all parts are merged.
AttentionPart = Sequence[KeyRange]


def keys_seen(r: KeyRange) -> torch.Tensor:
    """(N,) how many of a range's stored keys each of its queries sees."""
    assert r.keys is not None
    size = r.keys.stop - r.keys.start
    visible = torch.arange(1, size + 1) if r.staircase else r.visible
    if visible is None:
        return torch.full((r.queries.stop - r.queries.start,), size)
    return visible.repeat_interleave(r.width)


def bounds(parts: Sequence[AttentionPart], queries: int, stored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(len(parts), N) the first key that each part lets a query see, and the one after the last; 0 and 0: none.

    Keys are numbered: the stored ones first, then the forward's own. Where nothing is stored before the forward, the
    trajectories' keys are the first of its own.
    """
    first, end = torch.zeros(2, len(parts), queries, dtype=torch.long)
    n = torch.arange(queries)
    for part, first_N, end_N in zip(parts, first, end, strict=True):
        for r in part:
            if r.keys is None:
                own = stored + n[r.queries]
                first_N[r.queries], end_N[r.queries] = own - (own - own[0]) % r.width, own + 1
            else:
                first_N[r.queries], end_N[r.queries] = r.keys.start, r.keys.start + keys_seen(r)
    return first, end


def visibility(parts: Sequence[AttentionPart], queries: int, stored: int) -> torch.Tensor:
    """(N, stored + N) which keys a query sees; keys numbered as in `bounds`."""
    keys = torch.arange(stored + queries)
    seen = torch.zeros(queries, len(keys), dtype=torch.bool)
    for first_N, end_N in zip(*bounds(parts, queries, stored), strict=True):
        seen |= (keys >= first_N[:, None]) & (keys < end_N[:, None])
    return seen


class LayerInput(NamedTuple):
    """What one layer attends with: queries (H, N, D), own keys and values (K, N, D), stored ones (K, M, D)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    stored_key: torch.Tensor
    stored_value: torch.Tensor
    scale: float
    softcap: float | None


class Cascade:
    """Runs a model on packed rows and attends for its layers.

    Attributes:
        stored: the trajectories' keys and values.
        scored: of the current forward, see `run`.
        stores: of the current forward, see `run`.
    """

    def __init__(self, model, ignores_softcap: bool):
        self.stored: KeysAndValues = {}
        self.scored: torch.Tensor | None = None
        self.stores = 0
        self._model, self._ignores_softcap = model, ignores_softcap
        self._layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._parts: Sequence[AttentionPart] = ()
        self._scored_there: torch.Tensor | None = None  # on the model's device
        self._masks: dict[int, torch.Tensor] = {}  # by the first query of their range
        self._undo = ExitStack()

    def run(
        self, token_ids, position_ids, parts: Sequence[AttentionPart], scored: torch.Tensor | None, stores: int = 0
    ):
        """The model's output for one packed row (N,) of tokens.

        Args:
            parts: who sees what.
            scored: (M,) increasing, on the CPU: the tokens whose logits are asked for. None: no token's.
            stores: this many tokens, the first of the row, are those of trajectories, and their keys and values are
                stored. 0: use those that are stored already.

        Raises:
            ValueError: not every layer called this attention.
        """
        self._parts, self.scored, self.stores = parts, scored, stores
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

    def attend(self, module, query, key, value, scale: float, softcap: float | None) -> torch.Tensor:
        """(N, H, D) outputs for the queries (H, N, D) of one layer, whose own keys and values are (K, N, D).

        In the last layer only the scored tokens' outputs are right; the others' may be anything.
        """
        if self.stores:
            self.stored[module] = own_storage(key[:, : self.stores]), own_storage(value[:, : self.stores])
        softcap = None if self._ignores_softcap else softcap
        layer = LayerInput(query, key, value, *self.stored[module], scale, softcap)
        last = len(self.stored) == self._layers and module is next(reversed(self.stored))
        if last:
            self._limit_rest_of_layer(module, query)
            if self.scored is None:
                return query.new_zeros(query.shape[1], len(query), value.shape[-1])
        return self.attend_parts(layer, last)

    def attend_parts(self, layer: LayerInput, last: bool) -> torch.Tensor:
        """(N, H, D) outputs of a layer whose keys and values are stored; of the last layer, the scored tokens'."""
        merged = merge([self._attend_part(part, layer, last) for part in self._parts])
        return merged.to(layer.value.dtype).transpose(0, 1)

    def _limit_rest_of_layer(self, attention: torch.nn.Module, query: torch.Tensor) -> None:
        """For the rest of this run the layer's token-wise modules work for the scored tokens only."""
        queries = query.shape[1]
        nothing = torch.arange(queries - 1, queries, device=query.device)  # one token, because shapes need one
        rows = nothing if self._scored_there is None else self._scored_there
        for sibling in tokenwise_siblings(self._model, attention):
            self._undo.enter_context(replaced_forward(sibling, limited_to(rows, queries, sibling.forward)))

    def _attend_part(self, part: AttentionPart, layer: LayerInput, last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (H, N, D) and log of its denominator (H, N) by the keys of one part."""
        shape = layer.query.shape[:2]
        if len(part) == 1 and part[0].queries == slice(0, shape[1]) and not last:
            return self._attend_range(part[0], part[0].queries, layer)
        out = layer.query.new_zeros(*shape, layer.value.shape[-1])
        lse = layer.query.new_full(shape, -math.inf, dtype=torch.float32)  # no key, no weight
        for r in part:
            rows: slice | torch.Tensor = r.queries
            if last:
                scored = self._scored_in(r)
                if len(scored) == 0:
                    if r.keys is None:
                        lse[:, r.queries] = 0  # outputs of 0 that nobody reads: NaN would spread in a statistic
                    continue
                if r.keys is not None:
                    rows = scored
            range_out, range_lse = self._attend_range(r, rows, layer)
            out[:, rows], lse[:, rows] = range_out.to(out.dtype), range_lse.to(lse.dtype)
        return out, lse

    def _attend_range(self, r: KeyRange, rows: slice | torch.Tensor, layer: LayerInput):
        """`_attend_part` for some queries of one range: a slice of whole runs, or single ones by their numbers."""
        q, scale, softcap = layer.query[:, rows], layer.scale, layer.softcap
        if r.keys is None:
            return attend_own(q, layer.key[:, rows], layer.value[:, rows], r.width, scale, softcap)
        k, v = layer.stored_key[:, r.keys], layer.stored_value[:, r.keys]
        if r.staircase:  # equally many queries of every run
            return attend_staircase(q, k, v, scale, softcap)
        mask = None if r.visible is None else self._mask(r, q)
        if mask is not None and not isinstance(rows, slice):
            mask = mask[rows - r.queries.start]
        return attend_shared(q, k, v, scale, softcap, mask)

    def _scored_in(self, r: KeyRange) -> torch.Tensor:
        """The scored tokens among the queries of a range, on the model's device."""
        assert self.scored is not None and self._scored_there is not None
        first, end = torch.searchsorted(self.scored, torch.tensor([r.queries.start, r.queries.stop])).tolist()
        return self._scored_there[first:end]

    def _mask(self, r: KeyRange, q: torch.Tensor) -> torch.Tensor:
        """(N, M) additive mask of a range with `visible`; made once per forward, as it is the same in every layer."""
        assert r.keys is not None
        if r.queries.start not in self._masks:
            hidden = torch.arange(r.keys.stop - r.keys.start, device=q.device) >= keys_seen(r).to(q.device)[:, None]
            mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, -math.inf)
            self._masks[r.queries.start] = mask
        return self._masks[r.queries.start]


class MaskedAttention:
    """Does the same as `Cascade` for a model whose attention can't be replaced, by a 4-D mask and a key-value cache.

    The model computes everything that the mask hides too, and a forward holds a mask of all its tokens times all keys.
    """

    def __init__(self, model):
        self._model, self._cache = model, DynamicCache()

    def run(
        self, token_ids, position_ids, parts: Sequence[AttentionPart], scored: torch.Tensor | None, stores: int = 0
    ):
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


# -- the kernels ------------------------------------------------------------------------------------------------


def attend(q, k, v, scale: float, softcap: float | None = None, causal: bool = False, mask=None):
    """Attention (B, H, N, D) and the log of its denominator (B, H, N).

    A kernel of the device that doesn't hold the scores computes it where there is one for these arguments.

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
        # This kernel needs a mask whose rows start at multiples of 16. It pads the denominators to 32 queries.
        bias = F.pad(mask, (0, -k.shape[2] % 16)).narrow(1, 0, k.shape[2]).expand(*q.shape[:2], -1, -1)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, *expanded, bias, True, scale=scale)
        return out, lse.narrow(2, 0, q.shape[2])
    return attend_naive(q, k, v, scale, softcap, causal, mask)


def attend_naive(q, k, v, scale: float, softcap: float | None = None, causal: bool = False, mask=None):
    """The reference of `attend`, in float32; a few queries at a time, so that few scores exist at once."""
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


def attend_own(q, k, v, width: int, scale: float, softcap: float | None):
    """Queries (H, N, D) over their own keys (K, N, D), causally, in runs of `width` that don't see each other."""
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


def attend_shared(q, k, v, scale: float, softcap: float | None, mask=None):
    """Queries (H, N, D) over the same keys (K, M, D), some of which a mask (N, M) may hide.

    Without a mask the G heads of a key head become queries of one call. With one, the mask would have to be repeated G
    times, so the keys are expanded instead.
    """
    shape = len(k), len(q) // len(k), q.shape[1]  # K, G, N
    if mask is None:
        out, lse = attend(q.reshape(1, shape[0], -1, q.shape[2]), k.unsqueeze(0), v.unsqueeze(0), scale, softcap)
    else:
        k, v = (x.unsqueeze(1).expand(-1, shape[1], -1, -1) for x in (k, v))
        out, lse = attend(q.unflatten(0, shape[:2]), k, v, scale, softcap, mask=mask)
    return out.reshape(*q.shape[:2], -1), lse.reshape(q.shape[:2])


def attend_staircase(q, k, v, scale: float, softcap: float | None):
    """Queries (H, M runs * width, D) over keys (K, M, D), where run n sees the keys 0..n.

    For every place in a run and every one of the G heads of a key head this is a causal attention of M queries, so
    nothing is computed and then masked out.
    """
    key_heads, keys, _ = v.shape
    group, width = len(q) // key_heads, q.shape[1] // keys
    folded = q.unflatten(1, (keys, width)).unflatten(0, (key_heads, group))  # K, G, M, width, D
    folded = folded.permute(1, 3, 0, 2, 4).flatten(0, 1)
    out, lse = attend(folded, k.unsqueeze(0), v.unsqueeze(0), scale, softcap, causal=True)
    out = out.unflatten(0, (group, width)).permute(2, 0, 3, 1, 4)  # K, G, M, width, D
    lse = lse.unflatten(0, (group, width)).permute(2, 0, 3, 1)
    return out.flatten(2, 3).flatten(0, 1), lse.flatten(2, 3).flatten(0, 1)


def merge(parts) -> torch.Tensor:
    """(..., N, D) attention over all keys from parts [(output (..., N, D), log of its denominator (..., N)), ...]."""
    weights = torch.stack([lse.float() for _, lse in parts]).softmax(0)[..., None]
    total = parts[0][0] * weights[0]  # float32, as the weights are
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(out, weight)
    return total


# -- replacing what a model does --------------------------------------------------------------------------------


@contextmanager
def cascade_attention(model) -> Iterator[Cascade | MaskedAttention]:
    """An object whose `run` runs `model` with the attention of given parts. The model's own is restored at the end."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        if model.config._attn_implementation == IMPLEMENTATION:
            # Transformers' SDPA ignores a softcap silently. A model trained that way is measured that way.
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
    """Whether `captured_attention` serves a model: its attention can be switched and, unlike eager's, is registered."""
    name = model.config._attn_implementation
    with cascade_attention(model) as attention:
        return isinstance(attention, Cascade) and name in ALL_ATTENTION_FUNCTIONS


@contextmanager
def captured_attention(model) -> Iterator[KeysAndValues]:
    """The keys and values of the one forward that runs inside, of one packed row. The forward itself is unchanged.

    Only the function that is registered for the model's attention is wrapped. The name of the attention stays the same,
    because masks and much else depend on it.
    """
    stored: KeysAndValues = {}
    name = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS[name]

    def keeping(module, query, key, value, *args, **kwargs):
        stored[module] = own_storage(key[0].to(value.dtype)), own_storage(value[0])
        return original(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = keeping
    try:
        yield stored
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # the local entry, which hid the global one
        if ALL_ATTENTION_FUNCTIONS.get(name) is not original:  # there was another local one before
            ALL_ATTENTION_FUNCTIONS[name] = original


def own_storage(x: torch.Tensor) -> torch.Tensor:
    """A copy of a view that would keep a larger tensor alive, e.g. one projection for queries, keys and values."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """Let this instance of a module be called as `forward`. Its own is restored at the end."""
    original = module.forward
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the instance's, which hid the class's
        if module.forward != original:  # the instance had one before
            module.forward = original


def tokenwise_siblings(model, attention: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules next to an attention in its layer whose parameters all belong to linear layers.

    Those are MLPs, which compute every token independently of the others.
    """
    layer = next((m for m in model.modules() if any(child is attention for child in m.children())), None)
    found = []
    for sibling in [] if layer is None else layer.children():
        linear = {p for m in sibling.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters(recurse=False)}
        if sibling is not attention and linear and linear == set(sibling.parameters()):
            found.append(sibling)
    return found


def limited_to(rows: torch.Tensor, tokens: int, forward: Callable) -> Callable:
    """The `forward` of a token-wise module, limited to these rows of its input (1, tokens, D); the others' output is 0.

    It is not limited where its input has another shape, where it gets further arguments, or where it returns no tensor.
    """

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
