"""Cascade attention: many short probes read one shared copy of their trajectories' keys and values.

`cascade_attention` gives a runner, whose `forward` makes the model attend by given parts. It is a `Cascade`
for almost all models, and `MaskedAttention` for those whose attention can't be replaced. `iapo.probe.visibility` says
what a part is, and `iapo.probe.kernels` computes one.

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

Shape suffixes: H heads, K key heads, N queries, M keys, D head size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from iapo.probe.kernels import attend_own, attend_shared, attend_staircase, merge
from iapo.probe.module_forward import limited_to, replaced_forward, tokenwise_siblings
from iapo.probe.supported_models import USE_ANOTHER, CausalLM
from iapo.probe.visibility import AttentionPart, KeyRange, keys_seen, visibility

IMPLEMENTATION = "iapo_cascade"

# (K, M, D) keys and (K, M, D) values of every attention module, of one packed row of tokens.
KeysAndValues = dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]


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
    """Calls a model on packed rows and attends for its layers.

    Attributes:
        stored: the trajectories' keys and values.
        scored, stores: of the current forward, see `forward`.
    """

    def __init__(self, model: CausalLM, ignores_softcap: bool) -> None:
        self.stored: KeysAndValues = {}
        self.scored: torch.Tensor | None = None
        self.stores = 0
        self._model, self._ignores_softcap = model, ignores_softcap
        self._layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._parts: Sequence[AttentionPart] = ()
        self._scored_there: torch.Tensor | None = None  # on the model's device
        self._masks: dict[int, torch.Tensor] = {}  # by the first query of their range
        self._undo = ExitStack()

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        parts: Sequence[AttentionPart],
        scored: torch.Tensor | None,
        stores: int = 0,
    ) -> Any:
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
                f"transformers' attention interface, but the exit-entropy pass needs all or none to; {USE_ANOTHER}"
            )
        return output

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
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
        """For the rest of this forward the layer's token-wise modules work for the scored tokens only."""
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

    def _attend_range(
        self, r: KeyRange, rows: slice | torch.Tensor, layer: LayerInput
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_attend_part` for some queries of one range: a slice of whole sequences, or single ones by their numbers."""
        q, scale, softcap = layer.query[:, rows], layer.scale, layer.softcap
        if r.keys is None:
            return attend_own(q, layer.key[:, rows], layer.value[:, rows], r.width, scale, softcap)
        k, v = layer.stored_key[:, r.keys], layer.stored_value[:, r.keys]
        if r.staircase:  # equally many queries of every sequence
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

    def __init__(self, model: CausalLM) -> None:
        self._model, self._cache = model, DynamicCache()

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        parts: Sequence[AttentionPart],
        scored: torch.Tensor | None,
        stores: int = 0,
    ) -> Any:
        """As `Cascade.forward`."""
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


@contextmanager
def cascade_attention(model: CausalLM) -> Iterator[Cascade | MaskedAttention]:
    """A runner that makes `model` attend by given parts. The model's own attention is restored at the end."""
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


def can_capture(model: CausalLM) -> bool:
    """Whether `captured_attention` serves a model: its attention can be switched and, unlike eager's, is registered."""
    name = model.config._attn_implementation
    with cascade_attention(model) as attention:
        return isinstance(attention, Cascade) and name in ALL_ATTENTION_FUNCTIONS


@contextmanager
def captured_attention(model: CausalLM) -> Iterator[KeysAndValues]:
    """The keys and values of the one forward that runs inside, of one packed row. The forward itself is unchanged.

    Only the function that is registered for the model's attention is wrapped. The name of the attention stays the same,
    because masks and much else depend on it.
    """
    stored: KeysAndValues = {}
    name = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS[name]

    def keeping(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
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


_CURRENT: ContextVar[Cascade] = ContextVar("cascade")


def _interface(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The signature of transformers' attention functions; the batch is one packed row."""
    name = type(module).__name__
    if s_aux is not None:
        raise ValueError(f"model: {name} has attention sinks, which the exit-entropy pass lacks; {USE_ANOTHER}")
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"model: {name} makes masks or keys of its own, which the exit-entropy pass doesn't know; {USE_ANOTHER}"
        )
    dtype = value.dtype
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _CURRENT.get().attend(module, query[0].to(dtype), key[0].to(dtype), value[0], scale, softcap)
    return output[None].contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _interface)
