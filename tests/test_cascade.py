import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.cascade import Range, attend, attend_naive, merge, visibility


def tensors(B, H, N, M, D, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, n, D, generator=generator).to(dtype) for n in (N, M, M)]


@given(
    B=st.integers(1, 3), H=st.integers(1, 3), N=st.integers(1, 40), M=st.integers(1, 70), D=st.sampled_from([4, 8, 64])
)
def test_the_kernel_equals_the_naive_attention(B, H, N, M, D):
    q, k, v = tensors(B, H, N, M, D)
    for result, expected in zip(attend(q, k, v, 0.3), attend_naive(q, k, v, 0.3), strict=True):
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)
    mask = torch.where(torch.rand(N, M, generator=torch.Generator().manual_seed(M)) < 0.5, 0.0, -math.inf)
    mask[:, 0] = 0
    for result, expected in zip(attend(q, k, v, 0.3, mask=mask), attend_naive(q, k, v, 0.3, mask=mask), strict=True):
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)
    q = q[:, :, :M]
    own = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    for result, expected in zip(
        attend(q, *own, 0.3, causal=True), attend_naive(q, *own, 0.3, causal=True), strict=True
    ):
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)


def test_a_softcap_and_other_value_sizes_use_the_naive_attention():
    q, k, v = tensors(1, 2, 3, 5, 8)
    capped, _ = attend(q, k, v, 1.0, softcap=0.5)
    scores = 0.5 * torch.tanh(q @ k.transpose(-1, -2) / 0.5)
    torch.testing.assert_close(capped, scores.softmax(-1) @ v)
    narrow, _ = attend(q, k, v[..., :3], 1.0)
    torch.testing.assert_close(narrow, attend_naive(q, k, v, 1.0)[0][..., :3])


@pytest.mark.parametrize("cuts", [(0, 7), (0, 1, 7), (0, 3, 4, 7)])
def test_merged_parts_equal_the_whole(cuts):
    q, k, v = tensors(2, 3, 5, 7, 8)
    parts = [attend_naive(q, k[:, :, a:b], v[:, :, a:b], 0.4) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    torch.testing.assert_close(merge(parts), attend_naive(q, k, v, 0.4)[0])


def test_merge_by_hand_and_a_part_without_keys_counts_nothing():
    one, nothing = torch.tensor([[1.0, 2.0]]), torch.tensor([[99.0, 99.0]])
    assert merge([(one, torch.tensor([0.0])), (nothing, torch.tensor([-math.inf]))]).tolist() == [[1.0, 2.0]]
    three_to_one = merge([(one, torch.tensor([math.log(3)])), (torch.zeros(1, 2), torch.tensor([0.0]))])
    torch.testing.assert_close(three_to_one, torch.tensor([[0.75, 1.5]]))


def test_bf16_scores_are_not_rounded():
    q, k, v = tensors(1, 2, 20, 30, 64, dtype=torch.bfloat16)
    q = q * 8
    exact = attend_naive(q.double(), k.double(), v.double(), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attend_naive(q, k, v, 1.0)
    assert exact[1].std() > 5
    for a, b in zip(result, exact, strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-3, rtol=1e-5)


def test_visibility_by_hand():
    """Two stored keys; two probes of two tokens, of which the second sees the second key."""
    parts = [
        [Range(slice(0, 4), None, 2)],
        [Range(slice(0, 4), slice(0, 1), 1)],
        [Range(slice(0, 4), slice(1, 2), 2, torch.tensor([0, 1]))],
    ]
    assert visibility(parts, 4, 2).int().tolist() == [
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
