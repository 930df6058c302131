"""The other way to share keys and values: torch's FlexAttention, one compiled kernel with a block mask per forward.

Stored and own keys stand in one row; the mask says which of them a query sees, and blocks that nobody sees are left
out. All else is ours, also the last layer, where only scored tokens count.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from iapo import cascade

# A kernel for every length of a forward: with lengths left open, torch 2.13 makes code for a CPU that doesn't compile.
torch._dynamo.config.recompile_limit = 64
flex_attention = torch.compile(flex_attention, dynamic=False)


class FlexCascade(cascade.Cascade):
    """A `Cascade` whose probes attend by FlexAttention."""

    def run(self, token_ids, position_ids, parts, scored):
        """As `Cascade.run`."""
        if scored is not None:
            stored = next(iter(self.stored.values()))[0].shape[1]
            first, end = (x.to(token_ids.device) for x in cascade.bounds(parts, len(token_ids), stored))

            def sees(batch, head, query, key):
                return ((first[:, query] <= key) & (key < end[:, query])).any(0)

            size = len(token_ids), stored + len(token_ids)
            self._block_mask = create_block_mask(sees, None, None, *size, device=token_ids.device)
        return super().run(token_ids, position_ids, parts, scored)

    def attend(self, module, query, key, value, scale, softcap):
        """As `Cascade.attend`."""
        if self._scored is None or module is next(reversed(self.stored)):
            return super().attend(module, query, key, value, scale, softcap)
        keys, values = (torch.cat(pair, 1)[None] for pair in zip(self.stored[module], (key, value), strict=True))
        out = flex_attention(query[None], keys, values, block_mask=self._block_mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)


@contextmanager
def by_flex_attention():
    """Let the exit-entropy passes inside attend by FlexAttention."""
    with patch.object(cascade, "Cascade", FlexCascade):
        yield
