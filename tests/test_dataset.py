"""Every row of a data set has an index of its own, and those that have one keep it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

pytest.importorskip("verl")

from verl.utils.dataset.rl_dataset import RLHFDataset

from iapo.launch.compose import resolve
from iapo.verl_adapter.agent_loop import request_seed
from iapo.verl_adapter.dataset import NumberedDataset, are_numbered

TINY = Path(__file__).parent.parent / "iapo/assets/tiny"


def read(kind, folder, extra_info, contents=("1+1=", "2+2=", "1+" * 40 + "1=", "3+3=")):
    rows = {
        "prompt": [[{"role": "user", "content": content}] for content in contents],
        "data_source": ["sums"] * len(contents),
        "reward_model": [{"style": "rule", "ground_truth": "2"}] * len(contents),
    }
    if extra_info is not None:
        rows["extra_info"] = extra_info
    pq.write_table(pa.table(rows), folder / "train.parquet")
    options = ["data.max_prompt_length=32", "data.filter_overlong_prompts_workers=null"]
    config = resolve(["platform=cpu", f"data={folder}", "model=tiny", *options])
    return kind([str(folder / "train.parquet")], AutoTokenizer.from_pretrained(TINY), config.data)


def infos(*indices, split="train"):
    return [{"split": split, "index": index} for index in indices]


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (7, 5, 3, 1)])
def test_rows_with_an_index_are_verls(tmp_path, indices):
    mine, verls = (read(kind, tmp_path, infos(*indices)) for kind in (NumberedDataset, RLHFDataset))
    assert len(mine) == 3  # one prompt is too long
    for a, b in zip(mine, verls, strict=True):
        assert a.pop("dummy_tensor") == b.pop("dummy_tensor")
        assert a == b
    assert [row["index"] for row in mine] == [index for n, index in enumerate(indices) if n != 2]


@pytest.mark.parametrize(
    "extra_info",
    [None, [{"level": 1}] * 4, infos(0, 1, 2, 2), infos(0, 1, 2, None)],
    ids=["no column", "no index", "repeated", "one missing"],
)
def test_rows_without_an_index_get_their_position(tmp_path, extra_info):
    rows = list(read(NumberedDataset, tmp_path, extra_info))
    assert [row["index"] for row in rows] == [0, 1, 3]
    assert all("iapo_position" not in row for row in rows)
    # verl's rows share a number, so rollouts of different prompts would share their random numbers.
    seeds = {request_seed(0, 1, row["data_source"], None, row["index"], n) for row in rows for n in range(8)}
    assert len(seeds) == 24


def test_repeated_rows_are_sampled_independently(tmp_path):
    rows = list(read(NumberedDataset, tmp_path, infos(5, 5, 5), contents=["1+1="] * 3))
    assert [row["index"] for row in rows] == [0, 1, 2]


def test_splits_and_sources_number_their_own_rows():
    assert are_numbered([("a", {"split": "train", "index": 0}), ("a", {"split": "test", "index": 0})])
    assert are_numbered([("a", {"index": 0}), ("b", {"index": 0})])
    assert not are_numbered([("a", {"index": 0}), ("a", {"index": 0})])
    assert not are_numbered([("a", None)])
    assert are_numbered([])
