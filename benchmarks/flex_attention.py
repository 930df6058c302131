"""The other way to share keys and values: torch's FlexAttention, one compiled kernel with a block mask per forward.

Stored and own keys form one row. The mask says which of them a query sees, and blocks that no query sees are skipped.
Everything else is ours, including the last layer, where only scored tokens count.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from iapo.probe import attention
from iapo.probe.visibility import bounds

# One kernel per length of a forward: with lengths left open, torch 2.13 makes code for a CPU that doesn't compile.
torch._dynamo.config.recompile_limit = 64
flex_attention = torch.compile(flex_attention, dynamic=False)


class FlexCascade(attention.Cascade):
    """A `Cascade` whose probes attend by FlexAttention."""

    def forward(self, token_ids, position_ids, parts, scored, stores=0):
        """As `Cascade.forward`."""
        if scored is not None:
            stored = 0 if stores else next(iter(self.stored.values()))[0].shape[1]
            limits = torch.stack(bounds(parts, len(token_ids), stored)).to(token_ids.device)

            def sees(batch, head, query, key):
                seen = key < 0
                for part in range(len(parts)):  # a kernel can't reduce over them
                    seen = seen | (limits[0, part, query] <= key) & (key < limits[1, part, query])
                return seen

            size = len(token_ids), stored + len(token_ids)
            self._block_mask = create_block_mask(sees, None, None, *size, device=token_ids.device)
        return super().forward(token_ids, position_ids, parts, scored, stores)

    def attend_parts(self, layer, last):
        """As `Cascade.attend_parts`."""
        if self.scored is None or last:
            return super().attend_parts(layer, last)
        keys, values = layer.key, layer.value
        if not self.stores:
            keys, values = torch.cat([layer.stored_key, keys], 1), torch.cat([layer.stored_value, values], 1)
        inputs = layer.query[None], keys[None], values[None]
        out = flex_attention(*inputs, block_mask=self._block_mask, scale=layer.scale, enable_gqa=True)
        return out[0].transpose(0, 1)


@contextmanager
def by_flex_attention():
    """Let the exit-entropy passes inside attend by FlexAttention."""
    with patch.object(attention, "Cascade", FlexCascade):
        yield
