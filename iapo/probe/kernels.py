"""Attention over one range of keys, with the log of its softmax denominator, and the exact merge of several ranges.

Shape suffixes: B batch, H heads, K key heads, G = H / K heads per key head, N queries, M keys, D head size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

# Up to this many tokens per sequence, the heads of a key head share its keys in one masked call. For longer sequences
# each head gets a copy of the keys instead.
SHORT_SEQUENCE = 64
# Float32 scores that `attend_naive` holds at a time (64 MB).
SCORES_AT_A_TIME = 2**24


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
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


def attend_naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
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


def attend_own(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, width: int, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (H, N, D) over their own keys (K, N, D), causally, in sequences of `width` that don't see each other."""
    group = len(q) // len(k)
    q, k, v = (x.unflatten(1, (-1, width)).transpose(0, 1) for x in (q, k, v))  # sequences, H or K, width, D
    if group > 1 and width <= SHORT_SEQUENCE:
        mask = torch.full((width, width), -math.inf, dtype=q.dtype, device=q.device).triu(1).repeat(group, 1)
        folded = q.unflatten(1, (-1, group)).flatten(2, 3)  # sequences, K, G width, D
        out, lse = attend(folded, k, v, scale, softcap, mask=mask)
        out, lse = (x.unflatten(2, (group, width)).flatten(1, 2) for x in (out, lse))
    else:
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out, lse = attend(q, k, v, scale, softcap, causal=True)
    return out.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1, 2)


def attend_shared(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
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


def attend_staircase(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (H, M width, D), M sequences of `width`, over keys (K, M, D), where sequence n sees the keys 0..n.

    For every place in a sequence and every one of the G heads of a key head this is a causal attention of M queries, so
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


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """(..., N, D) attention over all keys from parts [(output (..., N, D), log of its denominator (..., N)), ...]."""
    weights = torch.stack([lse.float() for _, lse in parts]).softmax(0)[..., None]
    total = parts[0][0] * weights[0]  # float32, as the weights are
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        total.addcmul_(out, weight)
    return total
