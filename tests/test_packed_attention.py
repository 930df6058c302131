"""Attention per sequence of a pack, against plain Python and against transformers' masked attention."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.verl_adapter.packed_attention import IMPLEMENTATION, lacking, packed_attention
from tests.conftest import CONFIGS, make_model


def packed_row(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def naive(query, key, value, lengths, scale):
    """(N, H, D) by sums over the tokens that a query sees."""
    (heads, tokens, _), group = query.shape, len(query) // len(key)
    starts = [sum(lengths[:i]) for i, length in enumerate(lengths) for _ in range(length)]
    out = torch.zeros(tokens, heads, value.shape[-1])
    for n in range(tokens):
        for h in range(heads):
            seen = range(starts[n], n + 1)
            weights = [math.exp(scale * float(query[h, n] @ key[h // group, m])) for m in seen]
            for m, weight in zip(seen, weights, strict=True):
                out[n, h] += weight / sum(weights) * value[h // group, m]
    return out


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), groups=st.sampled_from([1, 2]), seed=st.integers(0, 99)
)
def test_equals_plain_python(lengths, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, key_heads = sum(lengths), 2
    query = torch.randn(1, groups * key_heads, tokens, 4, generator=generator)
    key, value = (torch.randn(1, key_heads, tokens, size, generator=generator) for size in (4, 4))
    out, weights = packed_attention(None, query, key, value, None, scaling=0.4, position_ids=packed_row(lengths))
    assert out.shape == (1, tokens, groups * key_heads, 4) and weights is None
    torch.testing.assert_close(out[0], naive(query[0], key[0], value[0], lengths, 0.4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("lengths", [[7], [1, 1, 1], [5, 40, 3, 17, 16, 15], [64, 1]])
def test_a_model_has_the_values_and_gradients_of_masked_attention(family, lengths):
    ids = torch.randint(0, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    results = []
    for implementation in ("sdpa", IMPLEMENTATION):
        model = make_model(family)
        model.set_attn_implementation(implementation)
        logits = model(input_ids=ids, position_ids=packed_row(lengths), use_cache=False).logits
        gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
        results.append((logits, gradients))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_every_row_of_a_batch_without_padding_is_a_sequence():
    model, ids = make_model("qwen2"), torch.randint(0, 97, (3, 6), generator=torch.Generator().manual_seed(2))
    expected = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(IMPLEMENTATION)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "given,named",
    [
        (dict(softcap=30.0), "a softcap"),
        (dict(sliding_window=3), "a sliding window"),
        (dict(s_aux=torch.zeros(2)), "attention sinks"),
        (dict(attention_mask=torch.ones(1, 4)), "padded rows"),
        (dict(key=torch.zeros(1, 2, 5, 4)), "keys of earlier tokens"),
    ],
)
def test_what_it_lacks_is_refused_in_one_line(given, named):
    x = torch.zeros(1, 2, 4, 4)
    arguments = dict(query=x, key=x, value=x, attention_mask=None) | given
    with pytest.raises(ValueError, match=f"attn_implementation: iapo_packed lacks {named}, .*; set it to sdpa"):
        packed_attention(torch.nn.Linear(1, 1), **arguments)


def test_a_window_as_long_as_the_row_changes_nothing():
    x = torch.randn(1, 2, 4, 4)
    out, _ = packed_attention(None, x, x, x, None, sliding_window=4)
    assert torch.equal(out, packed_attention(None, x, x, x, None)[0])


@pytest.mark.parametrize(
    "family,changes,length,expected",
    [
        ("qwen2", {}, 500, None),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, 100, "a softcap"),
        ("mistral", {"sliding_window": 100}, 101, "a sliding window"),
        ("mistral", {"sliding_window": 100}, 100, None),
        ("qwen2", {"sliding_window": 100}, 500, None),  # none of its layers uses it
    ],
)
def test_what_a_model_needs_is_known_before_it_runs(family, changes, length, expected):
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    assert lacking(config, length) == expected
