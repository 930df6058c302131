"""The other way to share keys and values: torch's FlexAttention, one compiled kernel with a block mask per forward.

Stored and own keys stand in one row; the mask says which of them a query sees, and blocks that nobody sees are left
out. All else is ours, also the last layer, where only scored tokens count.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from iapo.probe import attention

# A kernel for every length of a forward: with lengths left open, torch 2.13 makes code for a CPU that doesn't compile.
torch._dynamo.config.recompile_limit = 64
flex_attention = torch.compile(flex_attention, dynamic=False)


class FlexCascade(attention.Cascade):
    """A `Cascade` whose probes attend by FlexAttention."""

    def run(self, token_ids, position_ids, parts, scored, stores=0):
        """As `Cascade.run`."""
        if scored is not None:
            stored = 0 if stores else next(iter(self.stored.values()))[0].shape[1]
            bounds = torch.stack(attention.bounds(parts, len(token_ids), stored)).to(token_ids.device)

            def sees(batch, head, query, key):
                seen = key < 0
                for part in range(len(parts)):  # a kernel can't reduce over them
                    seen = seen | (bounds[0, part, query] <= key) & (key < bounds[1, part, query])
                return seen

            size = len(token_ids), stored + len(token_ids)
            self._block_mask = create_block_mask(sees, None, None, *size, device=token_ids.device)
        return super().run(token_ids, position_ids, parts, scored, stores)

    def attend(self, module, query, key, value, scale, softcap):
        """As `Cascade.attend`."""
        last = len(self.stored) == self._layers - 1 if self._stores else module is next(reversed(self.stored))
        if self._scored is None or last:
            return super().attend(module, query, key, value, scale, softcap)
        if self._stores:
            self.stored[module] = key[:, : self._stores].clone(), value[:, : self._stores].clone()
            keys, values = key[None], value[None]
        else:
            keys, values = (torch.cat(pair, 1)[None] for pair in zip(self.stored[module], (key, value), strict=True))
        out = flex_attention(query[None], keys, values, block_mask=self._block_mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)


@contextmanager
def by_flex_attention():
    """Let the exit-entropy passes inside attend by FlexAttention."""
    with patch.object(attention, "Cascade", FlexCascade):
        yield
