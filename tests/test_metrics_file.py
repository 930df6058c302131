import json

import numpy as np
import torch

from iapo.metrics.file import MetricsFile, read_metrics


def write(path, resume_step, steps, value=0.0):
    file = MetricsFile(path, resume_step)
    for step in steps:
        file.log({"a": value}, step)
    file.finish()


def test_a_resumed_run_continues_the_file(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, 0, [0, 1, 2, 3], value=1.0)
    first = path.read_bytes().splitlines()
    write(path, 2, [2, 3, 4], value=2.0)  # verl validates again at the step that it resumes from
    lines = path.read_bytes().splitlines()
    assert lines[:3] == first[:3]
    assert [(step, data["a"]) for step, data in read_metrics(path)] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]
    replaced = path.with_suffix(".replaced.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in replaced] == [3]


def test_a_half_written_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [0, 1])
    with path.open("a") as file:
        file.write('{"step": 2, "da')
    assert [step for step, _ in read_metrics(path)] == [0, 1]
    write(path, 1, [1, 2])
    assert [step for step, _ in read_metrics(path)] == [0, 1, 2]


def test_a_run_from_the_beginning_does_not_mix_with_an_earlier_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [0, 1], value=1.0)
    write(path, 0, [0, 1, 2], value=2.0)
    assert [(step, data["a"]) for step, data in read_metrics(path)] == [(0, 2), (1, 2), (2, 2)]
    assert len(path.with_suffix(".replaced.jsonl").read_text().splitlines()) == 2


def test_a_resume_step_that_was_never_logged_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [1])
    write(path, 2, [2, 3])
    assert [step for step, _ in read_metrics(path)] == [1, 2, 3]


def test_numpy_and_torch_scalars_become_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.log({"n": np.float64(0.5), "t": torch.tensor(2), "s": "x"}, 0)
    file.finish()
    assert read_metrics(path) == [(0, {"n": 0.5, "t": 2, "s": "x"})]
