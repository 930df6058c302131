"""What goes through the model together: completions packed into forwards without padding, and who sees whom.

A pack is some trajectories and their probes. A prompt that several of its completions share is in it once. Its first
forward has the trajectories and as many probes as fit. Its other forwards have probes only, which read the keys and
values that the first one stored. Or all forwards have probes only, and read the keys and values of a forward that the
caller made of the same sequences.

Everything here is about integers: no model, no floating-point number.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from iapo.config import IapoConfig
from iapo.probe.visibility import AttentionPart, KeyRange

# Limits of a block whose keys are masked, in queries x keys, half of which are masked out: as a share of the squared
# tokens per forward, and in any case. A larger block makes fewer calls and more wasted work. The share was tuned on a
# CPU with 768 tokens only.
MASKED_SHARE = 1 / 24
MASKED_AREA = 2**20


class Completion(NamedTuple):
    """A prompt (L_i,), its response (R_i,), where it is probed and what is probed for.

    Attributes:
        positions: (J_i,) response tokens before each probe, increasing from 0, see `probe_positions`. Response tokens
            after the last position are not read.
        answer: (A_i,) tokens to score after the probe. None: measure the entropy of the next token.
        suffixes: (J_i, W_i) the tokens of each position's probe, where these differ. None: those of all completions.
    """

    prompt: torch.Tensor
    response: torch.Tensor
    positions: torch.Tensor
    answer: torch.Tensor | None = None
    suffixes: torch.Tensor | None = None

    @property
    def trajectory(self) -> torch.Tensor:
        """The response up to its last position."""
        return self.response[: int(self.positions[-1])]

    @property
    def answered(self) -> int:
        """Answer tokens that follow the probe in the input: all but the last, which is only predicted."""
        return 0 if self.answer is None else max(len(self.answer) - 1, 0)

    def probe_length(self, usual: int) -> int:
        """Tokens of a probe, given those of a completion without suffixes."""
        return usual if self.suffixes is None else self.suffixes.shape[1]

    @property
    def nothing_to_score(self) -> bool:
        """An empty answer has probability 1."""
        return self.answer is not None and len(self.answer) == 0


class KVSlot(NamedTuple):
    """Where the keys and values of a completion's prompt and trajectory are among the stored ones."""

    prompt: slice
    trajectory: slice


class Forward(NamedTuple):
    """One call of the model.

    Attributes:
        token_ids, position_ids: (N,).
        parts: who sees what.
        stored: this many tokens, the first ones, are those of trajectories, and their keys and values are stored.
        blocks: (row, first, last): the probes in it, in order: those at a row's positions first..last.
        scored: (M,) the tokens whose logits count. None: there are no probes.
        probe_of_scored: (M,) number of the probe that each of them belongs to.
        targets: (M,) the tokens whose log-probabilities are asked for. None: the entropies are.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    parts: Sequence[AttentionPart]
    stored: int = 0
    blocks: Sequence[tuple[int, int, int]] = ()
    scored: torch.Tensor | None = None
    probe_of_scored: torch.Tensor | None = None
    targets: torch.Tensor | None = None


def probe_positions(
    length: int,
    stride: int = IapoConfig.stride,
    boundaries: torch.Tensor | None = None,
    max_gap: int = IapoConfig.max_gap,
) -> torch.Tensor:
    """(J,) where a region of `length` tokens is probed, in tokens before the probe; increasing, from 0 to length.

    Args:
        stride: without boundaries the positions are 0, k, 2k, ... and the last.
        boundaries: (length,) 1 on tokens that end a step. The positions are 0, the one after each of these tokens, the
            last, and as few in between, evenly, as leave no gap longer than `max_gap`.
    """
    if boundaries is None:
        return torch.tensor([*range(0, length, stride), length])
    ends = sorted({0, length, *(boundaries[:length].nonzero().flatten() + 1).tolist()})
    positions = [0]
    for start, end in pairwise(ends):
        pieces = math.ceil((end - start) / max_gap)
        positions += [start + (end - start) * k // pieces for k in range(1, pieces + 1)]
    return torch.tensor(positions)


def packs(completions: Sequence[Completion], max_tokens: int) -> list[list[list[int]]]:
    """Packs of groups of row numbers; the completions of a group have the same prompt.

    A pack's trajectories have at most `max_tokens` tokens, a shared prompt counted once. One row always fits.
    """
    result: list[list[list[int]]] = []
    room = 0
    for rows in _by_prompt(completions):
        prompt = completions[rows[0]].prompt
        opened = False  # does the current pack hold this prompt?
        for i, owner in _owners(completions, rows):
            response = len(completions[i].trajectory) if owner == i else 0
            needed = response + (0 if opened else len(prompt))
            if not result or (owner == i and needed > room):  # one that reads another's trajectory stays with it
                result.append([])
                room, opened, needed = max_tokens, False, response + len(prompt)
            if opened:
                result[-1][-1].append(i)
            else:
                result[-1].append([i])
            opened, room = True, room - needed
    return result


def _by_prompt(completions: Sequence[Completion]) -> list[list[int]]:
    """The rows with something to score, grouped by prompt."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, completion in enumerate(completions):
        if not completion.nothing_to_score:
            groups.setdefault(tuple(completion.prompt.tolist()), []).append(i)
    return list(groups.values())


def _owners(completions: Sequence[Completion], rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Rows, each with the row whose stored trajectory it reads.

    That is the row itself, or an earlier row with the same response and at least as long a trajectory. A response that
    is measured several times, with other answers or probes, is the same tensor.
    """
    owner = None
    for i in rows:
        ours = completions[i]
        if (
            owner is None
            or completions[owner].response is not ours.response
            or len(completions[owner].trajectory) < len(ours.trajectory)
        ):
            owner = i
        yield i, owner


def trajectory_forward(
    completions: Sequence[Completion], groups: Sequence[Sequence[int]]
) -> tuple[Forward, dict[int, KVSlot]]:
    """A forward of the trajectories of a pack, an element of `packs`, and the slots of its rows."""
    tokens, positions = [], []
    slots: dict[int, KVSlot] = {}
    own: list[KeyRange] = []
    prompts: list[KeyRange] = []
    end = 0

    def place(ids: torch.Tensor, first_position: int) -> slice:
        nonlocal end
        tokens.append(ids)
        positions.append(torch.arange(first_position, first_position + len(ids)))
        where = slice(end, end + len(ids))
        if len(ids):
            own.append(KeyRange(where, None, len(ids)))
        end = where.stop
        return where

    for group in groups:
        prompt_ids = completions[group[0]].prompt
        prompt = place(prompt_ids, 0)
        for i, owner in _owners(completions, group):
            trajectory = completions[i].trajectory
            if owner == i:
                slots[i] = KVSlot(prompt, place(trajectory, len(prompt_ids)))
            else:
                start = slots[owner].trajectory.start
                slots[i] = KVSlot(prompt, slice(start, start + len(trajectory)))
        if end > prompt.stop:
            prompts.append(KeyRange(slice(prompt.stop, end), prompt, 1))
    return Forward(torch.cat(tokens), torch.cat(positions), [own, prompts], end), slots


def slots_of_sequences(completions: Sequence[Completion], starts: Sequence[int]) -> dict[int, KVSlot]:
    """The slots in a forward of whole sequences, prompt and response, that start at `starts`.

    Rows with nothing to score get none.
    """
    slots = {}
    for i, (completion, start) in enumerate(zip(completions, starts, strict=True)):
        if completion.nothing_to_score:
            continue
        response = start + len(completion.prompt)
        slots[i] = KVSlot(slice(start, response), slice(response, response + len(completion.trajectory)))
    return slots


def forwards_of_pack(
    completions: Sequence[Completion],
    groups: Sequence[Sequence[int]],
    probe_ids: torch.Tensor,
    max_tokens: int,
    chunk_size: int | None = None,
) -> Iterator[Forward]:
    """The forwards of a pack: its trajectories with the first probes, as far as there is room, then the other probes.

    Args:
        chunk_size: probes per forward. None: as many as `max_tokens` holds; at least one where there are only probes.
    """
    trajectories, slots = trajectory_forward(completions, groups)
    chunks = _chunks(completions, slots, len(probe_ids), max_tokens, chunk_size, trajectories.stored)
    first = next(chunks)
    yield _probe_forward(completions, slots, probe_ids, first, max_tokens, trajectories) if first else trajectories
    for chunk in chunks:
        yield _probe_forward(completions, slots, probe_ids, chunk, max_tokens)


def probe_forwards(
    completions: Sequence[Completion],
    slots: dict[int, KVSlot],
    probe_ids: torch.Tensor,
    max_tokens: int,
    chunk_size: int | None = None,
) -> Iterator[Forward]:
    """The forwards of the probes of the rows in `slots`, which read the keys and values that are stored there."""
    for chunk in _chunks(completions, slots, len(probe_ids), max_tokens, chunk_size):
        yield _probe_forward(completions, slots, probe_ids, chunk, max_tokens)


def _probe_forward(
    completions: Sequence[Completion],
    slots: dict[int, KVSlot],
    probe_ids: torch.Tensor,
    chunk: Sequence[tuple[int, int]],
    max_tokens: int,
    trajectories: Forward | None = None,
) -> Forward:
    """One forward of the probes of a chunk, after the trajectories if these are given."""
    parts = _ProbeParts([], [], [], [])
    tokens, positions, blocks, scored, probe_of_scored, targets = [], [], [], [], [], []
    end = stored = probes = 0
    if trajectories:
        tokens, positions = [trajectories.token_ids], [trajectories.position_ids]
        for part, given in zip(parts, trajectories.parts, strict=False):
            part.extend(given)
        end = stored = trajectories.stored
    for i, first, last in _blocks(chunk, completions, len(probe_ids), min(MASKED_SHARE * max_tokens**2, MASKED_AREA)):
        completion = completions[i]
        before = completion.positions[first : last + 1]
        count = len(before)
        suffix = probe_ids.expand(count, -1) if completion.suffixes is None else completion.suffixes[first : last + 1]
        length = suffix.shape[1]
        if completion.answer is not None:
            suffix = torch.cat([suffix, completion.answer[:-1].expand(count, -1)], 1)
        width = suffix.shape[1]
        parts.add_block(slice(end, end + count * width), width, slots[i], before)
        tokens.append(suffix.flatten())
        positions.append((len(completion.prompt) + before[:, None] + torch.arange(width)).flatten())
        # The logits that count are those of the last probe token and of the answer tokens after it.
        offsets = torch.arange(length - 1, width)
        scored.append((torch.arange(end, end + count * width, width)[:, None] + offsets).flatten())
        probe_of_scored.append(torch.arange(probes, probes + count).repeat_interleave(len(offsets)))
        blocks.append((i, first, last))
        if completion.answer is not None:
            targets.append(completion.answer.repeat(count))
        end, probes = end + count * width, probes + count
    return Forward(
        torch.cat(tokens),
        torch.cat(positions),
        [part for part in parts if part],
        stored,
        blocks,
        torch.cat(scored),
        torch.cat(probe_of_scored),
        torch.cat(targets) if targets else None,
    )


class _ProbeParts(NamedTuple):
    """What the tokens of a forward of probes see.

    Attributes:
        own: their own sequence; the trajectories' tokens too, where the forward has some.
        prompts: whole prompts; the trajectories' tokens too.
        prefixes: what all probes of a block see of their trajectory.
        stairs: what each probe sees of it beyond that.
    """

    own: list[KeyRange]
    prompts: list[KeyRange]
    prefixes: list[KeyRange]
    stairs: list[KeyRange]

    def add_block(self, queries: slice, width: int, slot: KVSlot, before: torch.Tensor) -> None:
        """Add the probes of one block, `width` tokens each, which follow the first `before` (n,) trajectory tokens."""
        _extend(self.own, KeyRange(queries, None, width))
        start = slot.trajectory.start
        lowest, highest = start + int(before[0]), start + int(before[-1])
        if slot.prompt.stop == start:  # one range of keys instead of two
            self.prefixes.append(KeyRange(queries, slice(slot.prompt.start, lowest), width))
        else:
            _extend(self.prompts, KeyRange(queries, slot.prompt, 1))
            if lowest > start:
                self.prefixes.append(KeyRange(queries, slice(start, lowest), width))
        if highest > lowest:  # the first probe sees nothing more
            later = slice(queries.start + width, queries.stop)
            seen = before[1:] - before[0]
            staircase = len(seen) == int(seen[-1])
            self.stairs.append(KeyRange(later, slice(lowest, highest), width, None if staircase else seen, staircase))


def _extend(part: list[KeyRange], r: KeyRange) -> None:
    """Append a range, or merge it into the last one if that has the same keys and width and ends where it starts."""
    if part and (part[-1].keys, part[-1].width, part[-1].queries.stop) == (r.keys, r.width, r.queries.start):
        part[-1] = part[-1]._replace(queries=slice(part[-1].queries.start, r.queries.stop))
    else:
        part.append(r)


def longest(completions: Sequence[Completion], probe_length: int) -> int:
    """Tokens of the longest sequence that the model sees: prompt, trajectory, probe and answer."""
    lengths = [len(c.prompt) + len(c.trajectory) + c.probe_length(probe_length) + c.answered for c in completions]
    return max(lengths, default=probe_length)


def forward_count(
    completions: Sequence[Completion], probe_length: int, max_tokens: int, chunk_size: int | None = None
) -> int:
    """Calls of the model for all packs; the ranks of an FSDP model must make equally many."""
    count = 0
    for groups in packs(completions, max_tokens):
        rows = [i for group in groups for i in group]
        stored = sum(len(completions[group[0]].prompt) for group in groups)
        stored += sum(len(completions[i].trajectory) for i, owner in _owners(completions, rows) if owner == i)
        count += len(list(_chunks(completions, rows, probe_length, max_tokens, chunk_size, stored)))
    return count


def _chunks(
    completions: Sequence[Completion],
    rows: Collection[int],
    probe_length: int,
    max_tokens: int,
    chunk_size: int | None,
    stored: int = 0,
) -> Iterator[list[tuple[int, int]]]:
    """The probes of each forward, as (row, number of its position).

    Forwards have about the same size, so that none is a small remainder.

    Args:
        stored: trajectory tokens in the first forward, which has no probes if there is no room.
    """
    needed = {i: completions[i].probe_length(probe_length) + completions[i].answered for i in rows}
    if not needed:
        return
    widest = max(needed.values())
    total = sum(len(completions[i].positions) * tokens for i, tokens in needed.items())

    def share(total: int) -> int:
        return min(math.ceil(total / math.ceil(total / max_tokens)) + widest - 1, max_tokens)

    room = share(stored + total) - stored
    if stored and room < widest:
        yield []
        stored = 0
        room = share(total)
    size = share(stored + total)
    chunk: list[tuple[int, int]] = []
    for i, tokens in needed.items():
        for j in range(len(completions[i].positions)):
            if chunk and (tokens > room or len(chunk) == chunk_size):
                yield chunk
                chunk, room = [], size
            chunk.append((i, j))
            room -= tokens
    yield chunk


def _blocks(
    chunk: Sequence[tuple[int, int]], completions: Sequence[Completion], probe_length: int, masked_area: float
) -> Iterator[tuple[int, int, int]]:
    """(row, first, last): the probes of a chunk in blocks of one completion.

    A block is cut where its stairs would need a mask larger than `masked_area`. Probes at consecutive positions need no
    mask and are never cut.
    """
    row, first, last = *chunk[0], chunk[0][1]
    positions = completions[row].positions.tolist()
    for i, j in chunk[1:]:
        span = positions[j] - positions[first] if i == row else 0
        queries = (j - first + 1) * (completions[i].probe_length(probe_length) + completions[i].answered)
        if i != row or (span > j - first and queries * span > masked_area):
            yield row, first, last
            positions = positions if i == row else completions[i].positions.tolist()
            row, first = i, j
        last = j
    yield row, first, last
