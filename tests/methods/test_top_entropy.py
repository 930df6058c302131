"""The tokens of highest entropy against hand-computed numbers and a version in plain Python."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.methods import mask_tokens
from iapo.methods.dler import Dler
from iapo.methods.s_grpo import SGrpo
from iapo.methods.top_entropy import TopEntropy
from tests.methods.batches import Row, make_batch, row_lists, step


def row(group, reward, entropy):
    return Row(group, len(entropy), reward > 0, reward, [0] * len(entropy), entropy)


def kept(method, rows):
    """Per completion, a string of its tokens: x where it has a loss."""
    batch = make_batch(rows)
    mask = method.loss_mask(batch, torch.zeros(batch.response_mask.shape), batch.response_mask.bool())
    assert all(not mask[i, r.length :].any() for i, r in enumerate(rows))
    return ["".join(".x"[int(m)] for m in mask[i, : r.length]) for i, r in enumerate(rows)]


# Ten tokens of two prompts; the padding that make_batch adds has an entropy of 7.
BATCH = [row(0, 1.5, [0.1, 2.0, 0.3]), row(0, -1.5, [0.2]), row(1, 1.5, [0.9, 1.1]), row(1, -1.5, [0, 0.5, 0.8, 0.7])]


def test_the_highest_of_the_batch_are_kept():
    assert kept(TopEntropy(), BATCH) == [".x.", ".", ".x", "...."]
    assert kept(TopEntropy(share=0.45), BATCH) == [".x.", ".", "xx", "..xx"]  # 4.5 of 10: five


def test_the_others_have_no_loss_and_do_not_count():
    advantages, mask = step(TopEntropy(), make_batch(BATCH))
    assert mask.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(advantages, mask * 0.5**0.5)  # of rewards 1.5 and -1.5


@pytest.mark.parametrize(
    "entropies,expected",
    [
        ([[1.0, 1.0, 1.0], [1.0]], ["xxx", "x"]),
        ([[0.0, 0.0], [0.0]], ["xx", "x"]),
        ([[2.0, 1.0, 1.0], [1.0, 0.5]], ["x..", ".."]),
        ([[1.0, 0.5, 1.0], [0.5, 0.5]], ["x.x", ".."]),
        ([[0.3]], ["x"]),
        ([[0.3], [0.4]], [".", "x"]),
    ],
)
def test_ties_are_all_kept_and_one_token_at_least(entropies, expected):
    rows = [row(0, 1.5, entropy) for entropy in entropies]
    assert kept(TopEntropy(), rows) == expected


def test_the_smallest_share_keeps_one_token():
    assert kept(TopEntropy(share=1e-9), BATCH) == [".x.", ".", "..", "...."]


@pytest.mark.parametrize("first", [0, 1])
def test_what_another_method_leaves_out_has_no_rank(first):
    """Whatever the order of the methods. dler cuts at two tokens and drops the second group, which is all wrong."""
    rows = [row(0, 1.5, [0.1, 0.4]), row(0, -1.5, [0.3, 0.2, 3.0, 4.0]), *[row(1, -1.5, [2.0, 1.0])] * 2]
    methods = [Dler(target_length=2), TopEntropy(share=0.5)]
    batch = make_batch(rows)
    _, mask = mask_tokens([methods[first], methods[1 - first]], batch, torch.ones(batch.response_mask.shape))
    # Of 10 tokens 4 train. Among all tokens the upper half would be that of the others, and none would be left.
    assert mask.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@given(rows=row_lists, percent=st.integers(1, 99), seed=st.integers(0, 9))
def test_the_share_is_of_the_tokens_that_another_method_leaves(rows, percent, seed):
    batch, random = make_batch(rows), SGrpo(always=0, until=5, p=0.5, seed=seed)
    ones = torch.ones(batch.response_mask.shape)
    left = random.loss_mask(batch, ones, batch.response_mask.bool())
    if left.any():
        _, mask = mask_tokens([TopEntropy(share=percent / 100), random], batch, ones)
        entropies, kept = batch.entropy[left].tolist(), batch.entropy[mask.bool()].tolist()
        assert sorted(kept) == sorted(entropies)[-math.ceil(Fraction(percent, 100) * len(entropies)) :]
        assert not (mask.bool() & ~left).any()


def test_where_the_others_leave_nothing_there_is_nothing_to_rank():
    batch = make_batch([row(0, 1.5, [0.1, 0.4]), row(0, 1.5, [0.3])])  # all right, so dler drops it
    advantages, mask = mask_tokens([TopEntropy(), Dler(target_length=2)], batch, torch.ones(2, 2))
    assert not advantages.any() and torch.equal(mask, batch.response_mask)


@given(rows=row_lists, percent=st.integers(1, 99), digits=st.integers(0, 3))
def test_equals_plain_python(rows, percent, digits):
    rows = [r._replace(entropy=[round(h, digits) for h in r.entropy]) for r in rows]  # few digits make ties
    ranked = sorted((h for r in rows for h in r.entropy), reverse=True)
    tau = ranked[math.ceil(Fraction(percent, 100) * len(ranked)) - 1]
    expected = ["".join("x" if h >= tau else "." for h in r.entropy) for r in rows]
    assert kept(TopEntropy(share=percent / 100), rows) == expected


@pytest.mark.parametrize("share,tokens", [(0.1, 30), (0.2, 15), (0.3, 10), (0.07, 100), (0.55, 100), (0.29, 100)])
def test_a_whole_number_of_tokens_is_kept_exactly(share, tokens):
    line = kept(TopEntropy(share=share), [row(0, 1.5, [float(t) for t in range(tokens)])])[0]
    assert line.count("x") == round(share * tokens)


@pytest.mark.parametrize(
    "share,message",
    [
        (1.5, "share: 1.5 must be a number from 0 to 1"),
        (0, "share: 0 keeps no token; choose a number in between"),
        (1, "share: 1 keeps every token, which is variant=dapo; choose a number in between"),
    ],
)
def test_bad_knobs(share, message):
    with pytest.raises(ValueError, match=message):
        TopEntropy(share=share)
