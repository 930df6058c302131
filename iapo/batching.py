"""From ragged completions to the padded batches of `iapo.information`, and back."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from iapo.information import exit_entropy, forward_count


class Completion(NamedTuple):
    """One prompt (P_i,), its response (R_i,) and how many response tokens are probed (0 .. R_i)."""

    prompt: torch.Tensor
    response: torch.Tensor
    region_length: int


def micro_batches(completions: Sequence[Completion], max_tokens: int, probe_tokens: int = 0) -> list[list[int]]:
    """Row numbers, split so that no forward of a batch has more than `max_tokens` tokens (one row always fits).

    A row costs its padded trajectory in the first forward and `probe_tokens`, those of a chunk, in the others. Rows of
    similar length go together, so little is padded. The result of the pass does not depend on the split.
    """
    order = sorted(range(len(completions)), key=lambda i: (completions[i].region_length, len(completions[i].prompt)))
    batches: list[list[int]] = []
    prompt_width = region_width = 0
    for i in order:
        prompt_width = max(prompt_width, len(completions[i].prompt))
        region_width = max(region_width, completions[i].region_length)
        row_tokens = max(prompt_width + region_width, probe_tokens)
        if batches and (len(batches[-1]) + 1) * row_tokens <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
            prompt_width, region_width = len(completions[i].prompt), completions[i].region_length
    return batches


def pad(completions: Sequence[Completion]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids (B, S), attention_mask (B, S), region_mask (B, T): left-padded prompts, right-padded regions.

    Response tokens after a row's region are left out: no probe sees them.
    """
    B = len(completions)
    width = max(len(c.prompt) for c in completions)
    T = max(c.region_length for c in completions)
    input_ids = torch.zeros(B, width + T, dtype=torch.long)
    attention_mask = torch.zeros(B, width + T, dtype=torch.long)
    for b, (prompt, response, n) in enumerate(completions):
        input_ids[b, width - len(prompt) : width] = prompt
        input_ids[b, width : width + n] = response[:n]
        attention_mask[b, width - len(prompt) : width + n] = 1
    return input_ids, attention_mask, attention_mask[:, width:]


def exit_entropies(
    model,
    completions: Sequence[Completion],
    probe_ids: Sequence[int],
    *,
    chunk_size: int,
    stride: int,
    max_tokens: int,
    device: torch.device | str,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(row number, its h_0 .. h_{R_i} on the CPU) for every completion, micro-batch by micro-batch."""
    for rows in micro_batches(completions, max_tokens, chunk_size * len(probe_ids)):
        input_ids, attention_mask, region_mask = (x.to(device) for x in pad([completions[i] for i in rows]))
        h_BT1 = exit_entropy(
            model, input_ids, attention_mask, region_mask, probe_ids, chunk_size=chunk_size, stride=stride
        ).cpu()
        for b, i in enumerate(rows):
            n, length = completions[i].region_length, len(completions[i].response)
            yield i, torch.cat([h_BT1[b, : n + 1], h_BT1[b, n].expand(length - n)])


def total_forwards(
    completions: Sequence[Completion], probe_ids: Sequence[int], *, chunk_size: int, stride: int, max_tokens: int
) -> int:
    """Model forwards that `exit_entropies` makes; the ranks of an FSDP model must make equally many."""
    count = 0
    for rows in micro_batches(completions, max_tokens, chunk_size * len(probe_ids)):
        T = max(completions[i].region_length for i in rows)
        longest = torch.ones(1, T, dtype=torch.long)
        count += forward_count(longest, chunk_size=chunk_size, stride=stride)
    return count
