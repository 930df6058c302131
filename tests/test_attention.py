import math
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from iapo.probe import kernels
from iapo.probe.kernels import (
    attend,
    attend_naive,
    attend_own,
    attend_shared,
    attend_staircase,
    merge,
)
from iapo.probe.visibility import KeyRange, visibility


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
    parts = [attend_naive(q, k[:, :, a:b], v[:, :, a:b], 0.4) for a, b in pairwise(cuts)]
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
        [KeyRange(slice(0, 4), None, 2)],
        [KeyRange(slice(0, 4), slice(0, 1), 1)],
        [KeyRange(slice(2, 4), slice(1, 2), 2, torch.tensor([1]))],
    ]
    assert visibility(parts, 4, 2).int().tolist() == [
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    stairs = [[KeyRange(slice(0, 4), slice(0, 2), 2, staircase=True)]]
    assert visibility(stairs, 4, 2)[:, :2].int().tolist() == [[1, 0], [1, 0], [1, 1], [1, 1]]


@given(
    K=st.integers(1, 3),
    G=st.integers(1, 3),
    runs=st.integers(1, 40),
    width=st.integers(1, 5),
    dv=st.sampled_from([8, 3]),
)
def test_a_staircase_equals_its_mask(K, G, runs, width, dv):
    """Also where the values have another size, which takes the naive attention."""
    generator = torch.Generator().manual_seed(runs)
    q = torch.randn(K * G, runs * width, 8, generator=generator)
    k, v = torch.randn(K, runs, 8, generator=generator), torch.randn(K, runs, dv, generator=generator)
    stairs = KeyRange(slice(0, runs * width), slice(0, runs), width, staircase=True)
    mask = torch.where(visibility([[stairs]], runs * width, runs)[:, :runs], 0.0, -math.inf)
    expected = attend_naive(q[None], k.repeat_interleave(G, 0)[None], v.repeat_interleave(G, 0)[None], 0.4, mask=mask)
    for result, reference in zip(attend_staircase(q, k, v, 0.4, None), expected, strict=True):
        torch.testing.assert_close(result, reference[0], atol=2e-6, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_gpu_kernels_equal_the_naive_attention(dtype, size):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    q, k, v, own = random(12, 101 * 3, size), random(2, 101, size), random(2, 101, size), random(2, 101 * 3, size)
    mask = torch.where(torch.rand(303, 101, generator=generator) < 0.5, 0.0, -math.inf).to("cuda", dtype)
    mask[:, 0] = 0
    for function, arguments in (
        (attend_staircase, (q, k, v, 0.1, None)),
        (attend_shared, (q, k, v, 0.1, None)),
        (attend_shared, (q, k, v, 0.1, None, mask)),
        (attend_own, (q, own, own, 3, 0.1, None)),
        (attend_own, (q, own, own, 303, 0.1, None)),
    ):
        result = function(*arguments)
        with patch.object(kernels, "attend", attend_naive):
            expected = function(*arguments)
        torch.testing.assert_close(result[0].float(), expected[0], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(result[1], expected[1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_calls_of_the_gpu_kernels_fit_their_signatures(monkeypatch, dtype):
    """By torch's own shape functions, without a GPU: not what the kernels compute."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with FakeTensorMode(), patch.object(kernels, "attend_naive", side_effect=AssertionError("not a kernel")):
        shapes = (12, 300, 64), (2, 100, 64), (2, 300, 64), (300, 100)
        q, k, own, mask = (torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes)
        for out, lse in (
            attend_staircase(q, k, k, 0.3, None),
            attend_shared(q, k, k, 0.3, None),
            attend_shared(q, k, k, 0.3, None, mask),
            attend_own(q, own, own, 3, 0.3, None),
            attend_own(q, own, own, 300, 0.3, None),
        ):
            assert (out.shape, out.dtype, out.device.type) == ((12, 300, 64), dtype, "cuda")
            assert (lse.shape, lse.dtype) == ((12, 300), torch.float32)
