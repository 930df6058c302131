"""scripts/gpu_check.sh and its parts, on a CPU at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.sh"


def rows_of(tmp_path, *arguments):
    numbers = tmp_path / "numbers.jsonl"
    gpu_check.main([*arguments, "--device", "cpu", "--quick", "--json", str(numbers)])
    return [json.loads(line) for line in numbers.read_text().splitlines()]


def test_the_machine_is_named(tmp_path, capsys):
    found = {row["what"]: row["value"] for row in rows_of(tmp_path, "machine")}
    assert found["torch"] == torch.__version__ and found["device"].startswith("CPU")
    assert found["torch"] in capsys.readouterr().out


def test_exactness_is_of_both_models_and_precisions(tmp_path):
    rows = rows_of(tmp_path, "exactness")
    assert {(row["model"], row["dtype"]) for row in rows} == {
        (model, dtype) for model in ("small", "embedded") for dtype in ("float32", "bfloat16")
    }
    for row in rows:
        assert row["ours - naive, largest"] < (1e-4 if row["dtype"] == "float32" else 0.3)
    assert rows[-1]["spread"] > 0.1  # so that equality says something


def test_a_pass_that_is_wrong_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "exit_entropy", lambda *batch: gpu_check.exit_entropy_naive(*batch) + 0.01)
    with pytest.raises(ValueError, match=r"pass and plain forwards differ by 0\.01 nats"):
        rows_of(tmp_path, "exactness")


def test_speed_is_compared_with_the_floor_and_the_copies(tmp_path):
    rows = {row["method"]: row for row in rows_of(tmp_path, "speed", "--length", "24")}
    assert rows[gpu_check.FLOOR]["/ floor"] == 1 and rows["ours, full"]["peak MiB"] > 0
    assert any("KV copies" in name for name in rows)


def test_chunks_are_spread_over_the_whole_response():
    positions = gpu_check.spread_chunks(100, 4).view(-1, 4)
    assert len(positions) == 8 and positions[0].tolist() == [0, 1, 2, 3] and positions[-1].tolist() == [96, 97, 98, 99]
    assert gpu_check.spread_chunks(3, 3).tolist() == [0, 1, 2]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "gpu_check.sh: --device: torch sees no GPU; run on a machine with one"),
        (["--device", "tpu"], "gpu_check.sh: --device: 'tpu' must be cuda or cpu"),
        (["--speed"], "gpu_check.sh: arguments: '--speed'; known are"),
    ],
)
def test_the_script_refuses_in_one_line_and_writes_nothing(tmp_path, arguments, message):
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folder = [] if "--speed" in arguments else [str(tmp_path / "out")]
    result = subprocess.run(
        ["bash", SCRIPT, *arguments, *folder],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2 and result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_a_python_without_the_packages_is_refused_with_their_names(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    result = subprocess.run(
        ["bash", SCRIPT, "--device", "cpu", str(tmp_path / "out")],
        env=os.environ | {"PYTHON": str(bare)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    names = "torch transformers pytest pytest-timeout hypothesis"
    assert result.returncode == 2
    assert result.stderr == (
        f"gpu_check.sh: PYTHON: '{bare}' lacks {names}; install that (pip install {names}), or set PYTHON\n"
    )
