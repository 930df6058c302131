"""Who sees what in a packed forward: ranges of queries and the keys that each of them sees. Integers only.

Shape suffixes: N queries, M keys.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class KeyRange(NamedTuple):
    """Consecutive queries of a forward and some of the keys that they see.

    Attributes:
        queries: where they are in the forward.
        keys: a range of the stored keys. Every query sees all of it unless `visible` or `staircase` says otherwise.
            None: the queries' own keys; each sequence of `width` queries sees itself, causally.
        width: the queries are sequences of this many tokens: probes, or one trajectory.
        visible: (sequences,) how many of `keys` each sequence sees, counted from the first; at least one.
        staircase: there are as many sequences as `keys`, and sequence n sees the keys 0..n.
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
