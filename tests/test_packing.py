from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo.information import exit_entropies
from iapo.probe import packing
from iapo.probe.packing import (
    Completion,
    KVSlot,
    forward_count,
    packs,
    probe_forwards,
    probe_positions,
    slots_of_sequences,
    trajectory_forward,
)
from iapo.probe.visibility import KeyRange
from tests.conftest import VOCAB

PROBE = torch.tensor([5, 11])


def completion(prompt, response, positions, answer=None):
    return Completion(*(torch.tensor(x) for x in (prompt, response, positions)), answer)


def test_probe_positions_by_hand():
    assert probe_positions(5).tolist() == [0, 1, 2, 3, 4, 5]
    assert probe_positions(5, 2).tolist() == [0, 2, 4, 5]
    assert probe_positions(4, 2).tolist() == [0, 2, 4]
    assert probe_positions(0, 3).tolist() == [0]
    boundaries = torch.tensor([0, 1, 0, 0, 0, 0, 0, 1, 0])
    assert probe_positions(9, boundaries=boundaries, max_gap=9).tolist() == [0, 2, 8, 9]
    assert probe_positions(9, boundaries=boundaries, max_gap=3).tolist() == [0, 2, 5, 8, 9]
    assert probe_positions(9, boundaries=boundaries, max_gap=4).tolist() == [0, 2, 5, 8, 9]
    assert probe_positions(7, boundaries=boundaries).tolist() == [0, 2, 7]
    assert probe_positions(0, boundaries=boundaries).tolist() == [0]


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 12))
def test_boundaries_are_probed_and_no_gap_is_too_long(boundaries, gap):
    positions = probe_positions(
        len(boundaries), boundaries=torch.tensor(boundaries, dtype=torch.bool), max_gap=gap
    ).tolist()
    assert positions[0] == 0 and positions[-1] == len(boundaries)
    assert {t + 1 for t, ends in enumerate(boundaries) if ends} <= set(positions)
    assert all(0 < b - a <= gap for a, b in pairwise(positions))


def test_forwards_by_hand():
    """Two completions of one prompt, the second of one token; then their probes, four to a forward."""
    rows = [completion([1, 2], [3, 4, 6], [0, 1, 2]), completion([1, 2], [7], [0, 1])]
    trajectories, slots = trajectory_forward(rows, [[0, 1]])
    assert slots == {0: (slice(0, 2), slice(2, 4)), 1: (slice(0, 2), slice(4, 5))}
    first, second = probe_forwards(rows, slots, PROBE, max_tokens=100, chunk_size=4)
    assert trajectories.token_ids.tolist() == [1, 2, 3, 4, 7]  # token 6 is after the last position
    assert trajectories.position_ids.tolist() == [0, 1, 2, 3, 2]
    own, prompts = trajectories.parts
    assert own == [KeyRange(slice(0, 2), None, 2), KeyRange(slice(2, 4), None, 2), KeyRange(slice(4, 5), None, 1)]
    assert prompts == [KeyRange(slice(2, 5), slice(0, 2), 1)]
    assert first.token_ids.tolist() == [5, 11] * 4
    assert first.position_ids.tolist() == [2, 3, 3, 4, 4, 5, 2, 3]
    assert first.blocks == [(0, 0, 2), (1, 0, 0)] and first.scored.tolist() == [1, 3, 5, 7]
    own, prompts, prefixes, (stairs,) = first.parts
    assert own == [KeyRange(slice(0, 8), None, 2)]
    # The first row directly follows the prompt, which is part of its prefix.
    assert prefixes == [KeyRange(slice(0, 6), slice(0, 2), 2)] and prompts == [KeyRange(slice(6, 8), slice(0, 2), 1)]
    assert stairs == KeyRange(slice(2, 6), slice(2, 4), 2, staircase=True)  # the first probe sees nothing more
    assert second.blocks == [(1, 1, 1)]
    assert second.parts[2] == [KeyRange(slice(0, 2), slice(4, 5), 2)]  # a prefix that needs no mask


def test_probes_at_consecutive_positions_need_no_mask_and_others_small_ones(monkeypatch):
    row = completion([1], [*range(10)], [0, 1, 2, 3, 5, 7, 9])
    slots = {0: KVSlot(slice(0, 1), slice(1, 11))}
    (probes,) = probe_forwards([row], slots, PROBE, max_tokens=100)
    (masked,) = probes.parts[-1]
    assert masked[:3] == (slice(2, 14), slice(1, 10), 2) and masked.visible.tolist() == [1, 2, 3, 5, 7, 9]
    assert not masked.staircase
    monkeypatch.setattr(packing, "MASKED_SHARE", 25 / 100**2)  # queries x keys of at most 24
    (probes,) = probe_forwards([row], slots, PROBE, max_tokens=100)
    assert probes.blocks == [(0, 0, 3), (0, 4, 6)]
    consecutive, masked = probes.parts[-1]
    assert consecutive == KeyRange(slice(2, 8), slice(1, 4), 2, staircase=True)
    assert masked[:3] == (slice(10, 14), slice(6, 10), 2) and masked.visible.tolist() == [2, 4]


def test_answers_follow_the_probe_without_their_last_token():
    row = completion([1], [3], [0, 1], torch.tensor([8, 9, 10]))
    slots = {0: KVSlot(slice(0, 1), slice(1, 2))}
    (probes,) = probe_forwards([row], slots, PROBE, max_tokens=100)
    assert probes.token_ids.tolist() == [5, 11, 8, 9] * 2
    assert probes.scored.tolist() == [1, 2, 3, 5, 6, 7] and probes.targets.tolist() == [8, 9, 10] * 2
    assert probes.probe_of_scored.tolist() == [0, 0, 0, 1, 1, 1]


def test_slots_in_the_caller_s_forward_by_hand():
    """Whole sequences, one after the other."""
    rows = [
        completion([1, 2], [3, 4, 6], [0, 2]),
        completion([9], [3], [0, 1], torch.empty(0, dtype=torch.long)),  # nothing to score
        completion([1, 2], [7], [0, 1]),
    ]
    assert slots_of_sequences(rows, [0, 5, 7]) == {
        0: (slice(0, 2), slice(2, 4)),
        2: (slice(7, 9), slice(9, 10)),
    }
    assert list(probe_forwards(rows[1:2], slots_of_sequences(rows[1:2], [0]), PROBE, max_tokens=10)) == []


def random_rows(shapes, prompts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(0, VOCAB, (n,), generator=generator) for n in prompts]
    return [
        Completion(
            texts[p % len(texts)], torch.randint(0, VOCAB, (r,), generator=generator), probe_positions(min(n, r))
        )
        for p, r, n in shapes
    ]


SHAPES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12)


@given(SHAPES, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 60))
def test_packs_hold_every_row_once_within_the_budget(shapes, prompts, max_tokens):
    rows = random_rows(shapes, prompts)
    result = packs(rows, max_tokens)
    assert sorted(i for groups in result for group in groups for i in group) == list(range(len(rows)))
    for groups in result:
        tokens = sum(len(rows[group[0]].prompt) + sum(len(rows[i].trajectory) for i in group) for group in groups)
        assert tokens <= max_tokens or [len(group) for group in groups] == [1]
        for group in groups:
            assert all(torch.equal(rows[i].prompt, rows[group[0]].prompt) for i in group)


@settings(max_examples=15)
@given(SHAPES, st.integers(1, 200), st.sampled_from([None, 1, 7]))
def test_the_number_of_forwards_is_known_beforehand(models, shapes, max_tokens, chunk_size):
    rows = random_rows(shapes, [3, 5])
    calls = []
    handle = models["qwen2"].register_forward_hook(lambda *_: calls.append(1))
    values = exit_entropies(models["qwen2"], rows, PROBE, max_tokens=max_tokens, chunk_size=chunk_size)
    handle.remove()
    assert len(calls) == forward_count(rows, len(PROBE), max_tokens, chunk_size)
    assert [len(h) for h in values] == [len(row.response) + 1 for row in rows]


def test_an_empty_answer_costs_no_forward(models):
    rows = [completion([1], [3], [0, 1], torch.empty(0, dtype=torch.long))]
    assert packs(rows, 10) == [] and forward_count(rows, 2, 10) == 0
    assert [h.tolist() for h in exit_entropies(models["qwen2"], rows, PROBE)] == [[0.0, 0.0]]
