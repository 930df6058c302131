"""S-GRPO against hand-computed numbers and a version in plain Python."""

import hashlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from iapo.launch.compose import recipes_dir, register_resolvers
from iapo.methods.s_grpo import SGrpo
from tests.methods.batches import Row, make_batch, row_lists, step


def row(tokens):
    return Row(0, len(tokens), True, 1.5, tokens, [0.0] * len(tokens))


def kept(method, rows, step=1):
    """Per completion, a string of its tokens: x where it has a loss."""
    batch = make_batch(rows, step)
    mask = method.loss_mask(batch, torch.zeros(batch.response_mask.shape), batch.response_mask.bool())
    assert all(not mask[i, r.length :].any() for i, r in enumerate(rows))
    return ["".join(".x"[int(m)] for m in mask[i, : r.length]) for i, r in enumerate(rows)]


def test_the_first_tokens_are_kept_and_the_last_are_not():
    rows = [row([0] * 6), row([1] * 3), row([2] * 2), row([3])]
    assert kept(SGrpo(always=2, until=4, p=0), rows) == ["xx....", "xx.", "xx", "x"]
    assert kept(SGrpo(always=2, until=4, p=1), rows) == ["xxxx..", "xxx", "xx", "x"]
    assert kept(SGrpo(always=0, until=3, p=1), rows) == ["xxx...", "xxx", "xx", "x"]


def test_those_in_between_are_kept_with_probability_p():
    rows = [row([i] * 100) for i in range(100)]
    lines = kept(SGrpo(always=10, until=60, p=0.3), rows)
    share = [sum(line[t] == "x" for line in lines) / 100 for t in range(100)]
    assert share[:10] == [1.0] * 10 and share[60:] == [0.0] * 40
    # 100 draws per position and 5,000 in all: four standard deviations.
    assert all(abs(s - 0.3) < 0.19 for s in share[10:60])
    assert sum(share[10:60]) / 50 == pytest.approx(0.3, abs=0.026)


def test_dropped_tokens_have_no_loss_and_do_not_count():
    rows = [row([5] * 4), row([6] * 4)._replace(reward=-1.5)]
    advantages, mask = step(SGrpo(always=1, until=2, p=0), make_batch(rows))
    assert mask.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(advantages[:, 0], torch.tensor([0.5**0.5, -(0.5**0.5)]))
    assert not advantages[:, 1:].any()


@given(
    rows=row_lists,
    always=st.integers(0, 4),
    more=st.integers(1, 4),
    p=st.floats(0.01, 1),
    seed=st.integers(0, 2**40),
    step=st.integers(1, 10**6),
)
def test_equals_plain_python(rows, always, more, p, seed, step):
    expected = []
    for r in rows:
        digest = hashlib.blake2b(struct.pack(f"<{2 + r.length}q", seed, step, *r.tokens), digest_size=8).digest()
        draws = torch.rand(r.length, generator=torch.Generator().manual_seed(struct.unpack("<Q", digest)[0])).tolist()
        line = ""
        for t, draw in enumerate(draws, start=1):
            line += "x" if t <= always or (t <= always + more and draw < p) else "."
        expected.append(line)
    assert kept(SGrpo(always=always, until=always + more, p=p, seed=seed), rows, step) == expected


@given(rows=row_lists)
def test_a_completion_does_not_see_the_others(rows):
    method = SGrpo(always=1, until=8)
    assert kept(method, rows) == [kept(method, [r])[0] for r in rows]


def test_the_draw_depends_on_seed_step_and_tokens():
    rows = [row([7] * 60)]
    lines = [
        kept(SGrpo(always=5, until=60), rows),
        kept(SGrpo(always=5, until=60, seed=1), rows),
        kept(SGrpo(always=5, until=60), rows, step=2),
        kept(SGrpo(always=5, until=60), [row([7] * 59 + [8])]),
    ]
    assert len({line for [line] in lines}) == 4
    assert kept(SGrpo(always=5, until=60), rows) == lines[0]


@pytest.mark.parametrize(
    "knobs,message",
    [
        ({"always": -1}, "always: -1 must be a whole number of at least 0"),
        ({"until": 100}, "until: 100 must be a whole number of at least 150"),
        ({"always": 0, "until": 0}, "until: 0 must be a whole number of at least 1"),
        ({"p": 1.2}, "p: 1.2 must be a number from 0 to 1"),
        ({"seed": 0.5}, "seed: 0.5 must be a whole number"),
        ({"always": 0, "p": 0}, "p: 0 with always=0 keeps no token; raise one of them"),
    ],
)
def test_bad_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        SGrpo(**knobs)


def test_keeping_all_is_refused():
    assert not list(SGrpo().problems(8, 151))
    assert list(SGrpo().problems(8, 150)) == [
        "always: 150 of data.max_response_length=150 keeps every token; lower it."
    ]


def test_the_recipe_scales_with_the_response_budget():
    register_resolvers()
    recipe = OmegaConf.load(recipes_dir() / "variant" / "s_grpo.yaml")
    knobs = OmegaConf.merge(recipe, {"data": {"max_response_length": 512}, "seed": 3}).methods.s_grpo
    assert (knobs.always, knobs.until, knobs.seed) == (153, 341, 3)
