import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo.batching import Completion, exit_entropies, micro_batches, pad, total_forwards
from iapo.information import exit_entropy_naive
from tests.conftest import VOCAB

PROBE = [5, 11, 7]


def completions(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(0, VOCAB, (n,), generator=generator)

    return [Completion(tokens(p), tokens(r), region) for p, r, region in shapes]


def test_pad_by_hand():
    rows = [
        Completion(torch.tensor([1, 2]), torch.tensor([3, 4, 5]), 2),
        Completion(torch.tensor([6]), torch.tensor([7]), 1),
    ]
    input_ids, attention_mask, region_mask = pad(rows)
    assert input_ids.tolist() == [[1, 2, 3, 4], [0, 6, 7, 0]]
    assert attention_mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 0]]
    assert region_mask.tolist() == [[1, 1], [1, 0]]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=12),
    st.integers(1, 60),
)
def test_micro_batches_hold_every_row_once_within_the_budget(shapes, max_tokens):
    rows = completions([(p, r, r) for p, r in shapes])
    batches = micro_batches(rows, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        width = max(len(rows[i].prompt) for i in batch) + max(rows[i].region_length for i in batch)
        assert len(batch) == 1 or len(batch) * width <= max_tokens


@settings(max_examples=10)
@given(max_tokens=st.integers(1, 200), chunk_size=st.sampled_from([1, 7, 64]), stride=st.sampled_from([1, 3]))
def test_result_does_not_depend_on_the_split(models, max_tokens, chunk_size, stride):
    rows = completions([(3, 13, 13), (9, 1, 1), (1, 0, 0), (6, 20, 8), (4, 7, 0), (2, 5, 5)])
    calls = []
    handle = models["qwen2"].register_forward_hook(lambda *_: calls.append(1))
    split = dict(chunk_size=chunk_size, stride=stride, max_tokens=max_tokens)
    result = dict(exit_entropies(models["qwen2"], rows, PROBE, device="cpu", **split))
    handle.remove()
    assert len(calls) == total_forwards(rows, PROBE, **split)
    for i, row in enumerate(rows):
        expected = exit_entropy_naive(models["qwen2"], *pad([row]), PROBE, stride=stride)[0]
        assert len(result[i]) == len(row.response) + 1
        n = row.region_length
        torch.testing.assert_close(result[i][: n + 1], expected, atol=1e-5, rtol=0)
        assert (result[i][n:] == result[i][n]).all()
