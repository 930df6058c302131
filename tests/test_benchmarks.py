"""The benchmarks run, and what they compare with is exact; their numbers are in benchmarks/README.md."""

import pytest
import torch

from benchmarks import exit_entropy as benchmark
from benchmarks.kv_copies import exit_entropy_by_copies
from benchmarks.measure import table
from iapo.information import exit_entropy_naive
from tests.conftest import make_batch


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_the_competitor_equals_the_naive_reference(models, chunk_size):
    ids, everything, response_mask = make_batch([5], [13])
    expected = exit_entropy_naive(models["llama"], ids, everything, response_mask, [5, 11, 7])[0]
    result = exit_entropy_by_copies(models["llama"], ids[0, :5], ids[0, 5:], torch.tensor([5, 11, 7]), chunk_size)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_the_plain_forward_has_as_many_tokens_as_it_says(models):
    tokens = []
    handle = models["qwen2"].register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    benchmark.plain(models["qwen2"], 50, 20, 6, "cpu")
    handle.remove()
    assert tokens == [20, 20, 10]


def test_the_benchmark_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    benchmark.main(["--lengths", "16", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("ours: within") and lines[3].startswith("KV copies: within")
    first_cells = [line.split("|")[1].strip() for line in lines[6:]]
    assert [name.split(",")[0] for name in first_cells[:2]] == [
        "plain forward of the same tokens",
        "plain forward of the probe tokens",
    ]
    assert {"ours, full", "ours, stride 8", "ours, boundaries", "naive"} <= set(first_cells)
    assert any(name.startswith("per-position KV copies") for name in first_cells)


def test_a_table_by_hand():
    assert table(["name", "x"], [["a", "1"], ["long name", "22"]]).splitlines() == [
        "| name      |  x |",
        "|-----------|---:|",
        "| a         |  1 |",
        "| long name | 22 |",
    ]
