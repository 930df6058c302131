"""What goes through the model together: completions packed into forwards without padding, and who sees whom.

A pack is some trajectories, prompts that several completions share standing among them once, and their probes. Its
first forward has the trajectories and as many probes as have room beside them, the others have probes that read its
keys and values; or all probes read those of somebody else's forward of the same sequences. Everything here is
about integers: no model, no floating-point number.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from iapo.probe.attention import Part, Range

# Largest queries x keys of a block whose keys are masked, half of them, as a share of the squared tokens per forward,
# and in any case: a larger one makes fewer calls and more work in vain. Tried on a CPU with 768 tokens only.
MASKED_SHARE = 1 / 24
MASKED_AREA = 2**20


class Completion(NamedTuple):
    """A prompt (L_i,), its response (R_i,), where it is probed and what is probed for.

    Attributes:
        positions: (J_i,) response tokens in front of each probe, increasing from 0, see `probe_positions`. What comes
            after the last of them is not looked at.
        answer: (A_i,) tokens to score after the probe; None for the entropy of the next token.
    """

    prompt: torch.Tensor
    response: torch.Tensor
    positions: torch.Tensor
    answer: torch.Tensor | None = None

    @property
    def trajectory(self) -> torch.Tensor:
        return self.response[: int(self.positions[-1])]

    @property
    def answered(self) -> int:
        """Answer tokens that stand behind the probe: all but the last, which is only predicted."""
        return 0 if self.answer is None else max(len(self.answer) - 1, 0)

    @property
    def nothing_to_score(self) -> bool:
        """An empty answer has probability 1."""
        return self.answer is not None and len(self.answer) == 0


class Place(NamedTuple):
    """Where the keys of a completion's prompt and trajectory stand among those kept of one forward."""

    prompt: slice
    trajectory: slice


class Forward(NamedTuple):
    """One call of the model.

    Attributes:
        token_ids, position_ids: (N,).
        parts: who sees what.
        stored: the first tokens, those of trajectories, whose keys and values are kept.
        runs: (row, first, last): the probes in it, in order, by the places of their positions.
        scored: (M,) the tokens whose logits count; None: there are no probes.
        probe_of_scored: (M,) the probe that each of them belongs to.
        targets: (M,) the tokens whose log-probabilities are asked for; None: the entropies are.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    parts: list[Part]
    stored: int = 0
    runs: Sequence[tuple[int, int, int]] = ()
    scored: torch.Tensor | None = None
    probe_of_scored: torch.Tensor | None = None
    targets: torch.Tensor | None = None


def probe_positions(
    length: int, stride: int = 1, boundaries: torch.Tensor | None = None, max_gap: int = 64
) -> torch.Tensor:
    """Numbers of response tokens in front of the probes of a region of `length` tokens; (J,), increasing, 0 to length.

    Args:
        stride: without boundaries: 0, k, 2k, ... and the last.
        boundaries: (length,) 1 on tokens that end a step: probed are 0, the places after them, the last, and as few
            places in between, evenly, as leave no gap longer than `max_gap`.
    """
    if boundaries is None:
        return torch.tensor([*range(0, length, stride), length])
    ends = sorted({0, length, *(boundaries[:length].nonzero().flatten() + 1).tolist()})
    positions = [0]
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        pieces = math.ceil((end - start) / max_gap)
        positions += [start + (end - start) * k // pieces for k in range(1, pieces + 1)]
    return torch.tensor(positions)


def packs(completions: Sequence[Completion], max_tokens: int) -> list[list[list[int]]]:
    """Packs of groups of row numbers; the completions of a group have the same prompt.

    A pack's trajectories have at most `max_tokens` tokens, a shared prompt counted once; one row always fits.
    """
    result: list[list[list[int]]] = []
    room = 0
    for rows in _by_prompt(completions):
        prompt = completions[rows[0]].prompt
        opened = False  # does the current pack hold this prompt?
        for i in rows:
            response = len(completions[i].trajectory)
            needed = response + (0 if opened else len(prompt))
            if not result or needed > room:
                result.append([])
                room, opened, needed = max_tokens, False, response + len(prompt)
            if opened:
                result[-1][-1].append(i)
            else:
                result[-1].append([i])
            opened, room = True, room - needed
    return result


def _by_prompt(completions: Sequence[Completion]) -> list[list[int]]:
    """The rows with something to score, in groups that have the same prompt."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, completion in enumerate(completions):
        if not completion.nothing_to_score:
            groups.setdefault(tuple(completion.prompt.tolist()), []).append(i)
    return list(groups.values())


def trajectory_forward(
    completions: Sequence[Completion], groups: Sequence[Sequence[int]]
) -> tuple[Forward, dict[int, Place]]:
    """A forward of the trajectories of a pack, an element of `packs`, and where each of its rows then stands."""
    tokens, positions = [], []
    places: dict[int, Place] = {}
    own: list[Range] = []
    prompts: list[Range] = []
    end = 0

    def place(ids: torch.Tensor, first_position: int) -> slice:
        nonlocal end
        tokens.append(ids)
        positions.append(torch.arange(first_position, first_position + len(ids)))
        where = slice(end, end + len(ids))
        if len(ids):
            own.append(Range(where, None, len(ids)))
        end = where.stop
        return where

    for group in groups:
        prompt_ids = completions[group[0]].prompt
        prompt = place(prompt_ids, 0)
        for i in group:
            places[i] = Place(prompt, place(completions[i].trajectory, len(prompt_ids)))
        if end > prompt.stop:
            prompts.append(Range(slice(prompt.stop, end), prompt, 1))
    return Forward(torch.cat(tokens), torch.cat(positions), [own, prompts], end), places


def places_of_sequences(completions: Sequence[Completion], starts: Sequence[int]) -> dict[int, Place]:
    """Where rows stand in somebody else's forward of their whole sequences, prompt and response, from `starts` on."""
    places = {}
    for i, (completion, start) in enumerate(zip(completions, starts, strict=True)):
        if completion.nothing_to_score:
            continue
        response = start + len(completion.prompt)
        places[i] = Place(slice(start, response), slice(response, response + len(completion.trajectory)))
    return places


def forwards_of_pack(
    completions: Sequence[Completion],
    groups: Sequence[Sequence[int]],
    probe_ids: torch.Tensor,
    max_tokens: int,
    chunk_size: int | None = None,
) -> Iterator[Forward]:
    """The forwards of a pack: its trajectories and the first probes, as far as there is room, then the other probes.

    Args:
        chunk_size: probes per forward; None: as many as `max_tokens` holds, at least one beside no trajectories.
    """
    trajectories, places = trajectory_forward(completions, groups)
    chunks = _chunks(completions, places, len(probe_ids), max_tokens, chunk_size, trajectories.stored)
    first = next(chunks)
    yield _probe_forward(completions, places, probe_ids, first, max_tokens, trajectories) if first else trajectories
    for chunk in chunks:
        yield _probe_forward(completions, places, probe_ids, chunk, max_tokens)


def probe_forwards(
    completions: Sequence[Completion],
    places: dict[int, Place],
    probe_ids: torch.Tensor,
    max_tokens: int,
    chunk_size: int | None = None,
) -> Iterator[Forward]:
    """The forwards of the probes of the rows in `places`, over the keys and values that stand there."""
    for chunk in _chunks(completions, places, len(probe_ids), max_tokens, chunk_size):
        yield _probe_forward(completions, places, probe_ids, chunk, max_tokens)


def _probe_forward(
    completions: Sequence[Completion],
    places: dict[int, Place],
    probe_ids: torch.Tensor,
    chunk: Sequence[tuple[int, int]],
    max_tokens: int,
    trajectories: Forward | None = None,
) -> Forward:
    """One forward of the probes of a chunk, of the trajectories in front of them if they are given."""
    tokens, positions, runs, scored, targets = [], [], [], [], []
    own, prompts, prefixes, stairs = parts = [], [], [], []
    end = stored = 0
    if trajectories:
        tokens, positions = [trajectories.token_ids], [trajectories.position_ids]
        for part, given in zip(parts, trajectories.parts, strict=False):
            part.extend(given)
        end = stored = trajectories.stored
    for i, first, last in _runs(chunk, completions, len(probe_ids), min(MASKED_SHARE * max_tokens**2, MASKED_AREA)):
        completion, (prompt, response) = completions[i], places[i]
        before = completion.positions[first : last + 1]
        count = len(before)
        suffix = probe_ids if completion.answer is None else torch.cat([probe_ids, completion.answer[:-1]])
        width = len(suffix)
        queries = slice(end, end + count * width)
        end = queries.stop
        _extend(own, Range(queries, None, width))
        lowest, highest = (response.start + int(before[k]) for k in (0, -1))
        if prompt.stop == response.start:  # one range of keys instead of two
            prefixes.append(Range(queries, slice(prompt.start, lowest), width))
        else:
            _extend(prompts, Range(queries, prompt, 1))
            if lowest > response.start:
                prefixes.append(Range(queries, slice(response.start, lowest), width))
        if highest > lowest:
            later = slice(queries.start + width, queries.stop)
            seen = before[1:] - before[0]
            staircase = len(seen) == int(seen[-1])
            stairs.append(Range(later, slice(lowest, highest), width, None if staircase else seen, staircase))
        tokens.append(suffix.repeat(count))
        positions.append((len(completion.prompt) + before[:, None] + torch.arange(width)).flatten())
        # The logits that count: of the last probe token and of the answer tokens behind it.
        offsets = torch.arange(len(probe_ids) - 1, width)
        scored.append((torch.arange(queries.start, queries.stop, width)[:, None] + offsets).flatten())
        runs.append((i, first, last))
        if completion.answer is not None:
            targets.append(completion.answer.repeat(count))
    per_probe = [completions[i].answered + 1 for i, first, last in runs for _ in range(first, last + 1)]
    return Forward(
        torch.cat(tokens),
        torch.cat(positions),
        [part for part in parts if part],
        stored,
        runs,
        torch.cat(scored),
        torch.arange(len(per_probe)).repeat_interleave(torch.tensor(per_probe)),
        torch.cat(targets) if targets else None,
    )


def _extend(part: list[Range], r: Range) -> None:
    """Append a range, or make it one with the last if it goes on with the same keys and width."""
    if part and (part[-1].keys, part[-1].width, part[-1].queries.stop) == (r.keys, r.width, r.queries.start):
        part[-1] = part[-1]._replace(queries=slice(part[-1].queries.start, r.queries.stop))
    else:
        part.append(r)


def longest(completions: Sequence[Completion], probe_length: int) -> int:
    """Tokens of the longest sequence that the model sees at once: prompt, response, probe and answer."""
    return probe_length + max((len(c.prompt) + len(c.trajectory) + c.answered for c in completions), default=0)


def forward_count(
    completions: Sequence[Completion], probe_length: int, max_tokens: int, chunk_size: int | None = None
) -> int:
    """Calls of the model for all packs; the ranks of an FSDP model must make equally many."""
    count = 0
    for groups in packs(completions, max_tokens):
        rows = [i for group in groups for i in group]
        beside = sum(len(completions[group[0]].prompt) for group in groups)
        beside += sum(len(completions[i].trajectory) for i in rows)
        count += len(list(_chunks(completions, rows, probe_length, max_tokens, chunk_size, beside)))
    return count


def _chunks(
    completions, rows, probe_length: int, max_tokens: int, chunk_size: int | None, beside: int = 0
) -> Iterator[list[tuple[int, int]]]:
    """(row, place of its position) of the probes of each forward; forwards of about the same size, none a remainder.

    Args:
        beside: other tokens in the first forward; it has no probes if there is no room.
    """
    needed = {i: probe_length + completions[i].answered for i in rows}
    if not needed:
        return
    widest = max(needed.values())
    total = sum(len(completions[i].positions) * tokens for i, tokens in needed.items())

    def share(total: int) -> int:
        return min(math.ceil(total / math.ceil(total / max_tokens)) + widest - 1, max_tokens)

    room = share(beside + total) - beside
    if beside and room < widest:
        yield []
        beside = 0
        room = share(total)
    size = share(beside + total)
    chunk = []
    for i, tokens in needed.items():
        for j in range(len(completions[i].positions)):
            if chunk and (tokens > room or len(chunk) == chunk_size):
                yield chunk
                chunk, room = [], size
            chunk.append((i, j))
            room -= tokens
    yield chunk


def _runs(chunk, completions, probe_length: int, masked_area: float) -> Iterator[tuple[int, int, int]]:
    """(row, first, last): the probes of a chunk in runs of one completion, cut where their stairs get too large, unless
    they are at consecutive positions and need no mask."""
    row, first, last = *chunk[0], chunk[0][1]
    positions = completions[row].positions.tolist()
    for i, j in chunk[1:]:
        span = positions[j] - positions[first] if i == row else 0
        queries = (j - first + 1) * (probe_length + completions[i].answered)
        if i != row or (span > j - first and queries * span > masked_area):
            yield row, first, last
            positions = positions if i == row else completions[i].positions.tolist()
            row, first = i, j
        last = j
    yield row, first, last
