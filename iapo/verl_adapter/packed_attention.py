"""Causal attention over packed sequences on a CPU that computes no scores between different sequences.

verl packs the sequences of a micro-batch into one row (`use_remove_padding`). FlashAttention has kernels for such rows.
On a CPU, transformers' SDPA computes the scores of the whole row and masks most of them out: for a pack of N tokens in
sequences of L that is N / L times the work. Here each sequence attends to itself alone.

Shape suffixes: N tokens of the row, S sequences, L tokens of the longest, H heads, K key heads, D head size.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "iapo_packed"


def packed_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' attention interface.

        o_n = sum_m softmax_m(q_n . k_m * scaling) v_m,    m <= n in the sequence of n

    Args:
        query: (B, H, N, D). key, value: (B, K, N, D). With B > 1 every row is one sequence.
        position_ids: (1, N), which restart at every sequence; None: each row is one sequence.

    Returns:
        (B, N, H, D), and no weights.

    Raises:
        ValueError: what this kernel lacks: padding, keys of earlier tokens, a softcap, a sliding window that is shorter
            than the row, sinks.
    """
    _check(module, query, key, attention_mask, softcap, sliding_window, s_aux)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    lengths = _lengths(position_ids) if len(query) == 1 and position_ids is not None else []
    if len(lengths) <= 1:
        out = F.scaled_dot_product_attention(query, key, value, None, dropout, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    out = query.new_zeros(query.shape[2], query.shape[1], value.shape[-1])  # N, H, D
    for rows_SL, kept_SL in _buckets(torch.tensor(lengths)):
        padded = [x[0][:, rows_SL].transpose(0, 1) for x in (query, key, value)]  # S, H, L, D
        # Padding is on the right, where no token of the sequence sees it.
        own = F.scaled_dot_product_attention(*padded, None, dropout, is_causal=True, scale=scaling)
        out = out.index_put((rows_SL[kept_SL],), own.transpose(1, 2)[kept_SL])
    return out[None], None


def lacking(config, length: int) -> str | None:
    """What a model with this Hugging Face config needs at `length` tokens and this kernel lacks; None: nothing."""
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    if getattr(text, "attn_logit_softcapping", None):
        return "a softcap"
    return "a sliding window" if windowed and window is not None and window < length else None


def _lengths(position_ids: torch.Tensor) -> list[int]:
    """Tokens of each sequence: one begins wherever a position doesn't continue the one before."""
    position_N = position_ids[0]
    begins = torch.cat([position_N.new_ones(1, dtype=torch.bool), position_N[1:] != position_N[:-1] + 1])
    starts = begins.nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([len(position_N)])]).diff().tolist()


def _buckets(lengths_S: torch.Tensor):
    """(S, L) places in the row of sequences of similar length, and which of them are theirs; one pair per bucket.

    Lengths of a bucket are less than a factor of two apart, so that a long sequence makes no padding for short ones.
    """
    starts_S = lengths_S.cumsum(0) - lengths_S
    size_S = lengths_S.float().log2().long()
    for size in size_S.unique():
        starts, lengths = starts_S[size_S == size], lengths_S[size_S == size]
        offsets_L = torch.arange(int(lengths.max()))
        kept_SL = offsets_L < lengths[:, None]
        yield torch.where(kept_SL, starts[:, None] + offsets_L, starts[:, None]), kept_SL


def _check(module, query, key, attention_mask, softcap, sliding_window, s_aux) -> None:
    tokens = query.shape[2]
    lacking = {
        "padded rows": attention_mask is not None,
        "keys of earlier tokens": key.shape[2] != tokens,
        "a softcap": softcap is not None,
        "a sliding window": sliding_window is not None and sliding_window < tokens,
        "attention sinks": s_aux is not None,
    }
    for name, found in lacking.items():
        if found:
            raise ValueError(
                f"actor_rollout_ref.model.override_config.attn_implementation: {IMPLEMENTATION} lacks {name}, which "
                f"{type(module).__name__} has here; set it to sdpa."
            )


AttentionInterface.register(IMPLEMENTATION, packed_attention)
