"""The competitor: exit entropies with one copy of the prefix's keys and values per position.

This is what the released research code does, in a fair form: only prefixes are copied, the prefixes grow from chunk to
chunk, the copies of a chunk go through the model as one batch, and the benchmark takes the best chunk size.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from iapo.information import entropy


def exit_entropy_by_copies(
    model, prompt, response, probe_ids, chunk_size: int, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """(T + 1,) float32 for one completion without padding: prompt (L,), response (T,), probe_ids (P,).

    With `positions` (J,), increasing, only the values at these.
    """
    device, length, P = prompt.device, len(prompt), len(probe_ids)
    with torch.no_grad():
        ids = torch.cat([prompt, response])[None]
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        values = []
        positions = torch.arange(len(response) + 1, device=device) if positions is None else positions
        for chunk in positions.split(chunk_size):
            longest = length + int(chunk[-1])
            copies = DynamicCache()
            for layer in cache.layers:
                copy = DynamicLayer()  # `update` would copy once more
                keys, values_ = (x[:, :, :longest].repeat(len(chunk), 1, 1, 1) for x in (layer.keys, layer.values))
                copy.lazy_initialization(keys, values_)
                copy.keys, copy.values = keys, values_
                copies.layers.append(copy)
            prefix = torch.arange(longest, device=device) < length + chunk[:, None]
            mask = torch.cat([prefix, torch.ones(len(chunk), P, dtype=torch.bool, device=device)], 1)
            logits = model(
                input_ids=probe_ids.expand(len(chunk), -1),
                attention_mask=mask.long(),
                position_ids=length + chunk[:, None] + torch.arange(P, device=device),
                past_key_values=copies,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            values.append(entropy(logits[:, -1]))
    return torch.cat(values)
