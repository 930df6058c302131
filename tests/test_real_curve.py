"""What is kept and shown of runs on a real model, on a run folder by hand."""

import json

import pytest

from benchmarks import real_curve

PROMPT = "system\nYou are SmolLM\nuser\n{}\n\nReason within <think> </think>.\nassistant\n"
VALIDATED = {"acc": "val-core/svamp/acc/mean@1", "format": "val-aux/svamp/format/mean@1"}
VALIDATED |= {"tokens": "val-aux/svamp/response_length/mean@1"}


def sample(question: str, text: str, acc: float, tokens: int) -> dict:
    return {"input": PROMPT.format(question), "output": text, "gts": "3", "acc": acc, "response_length": float(tokens)}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "grpo-0"
    (folder / "validation").mkdir(parents=True)
    start = {
        "time": "now",
        "arguments": ["variant=grpo", "run_dir=/a/b/grpo-0"],
        "versions": {"verl": "0.9.1"},
        "else": 1,
    }
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    before, after = (
        {VALIDATED["acc"]: acc, VALIDATED["format"]: 1.0, VALIDATED["tokens"]: tokens}
        for acc, tokens in ((0.25, 25.0), (0.5, 20.0))
    )
    trained = {"timing_s/step": 1800.0, "iapo/reward/acc": 0.123456}
    lines = [(0, before), (1, trained), (2, trained | after)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "data": d}) + "\n" for s, d in lines))
    for step, samples in (
        (0, [sample("6 - 3?", "<think>6 - 3 = 3</think>\n3", 1.0, 23), sample("a | b?", "`4`", 0.0, 9)]),
        (2, [sample("6 - 3?", "3", 1.0, 3), sample("another?", "4", 0.0, 9)]),
    ):
        (folder / f"validation/{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


def test_what_is_kept_of_a_run_by_hand(run):
    found = real_curve.record(run)
    (start,) = found["starts"]
    assert start == {"time": "now", "arguments": ["variant=grpo", "run_dir=grpo-0"], "versions": {"verl": "0.9.1"}}
    assert found["validations"] == [
        {"step": 0, "acc": 0.25, "format": 1.0, "response_length": 25.0},
        {"step": 2, "acc": 0.5, "format": 1.0, "response_length": 20.0},
    ]
    assert found["steps"] == [{"step": step, "acc": 0.1235, "seconds": 1800.0} for step in (1, 2)]
    (trace,) = found["traces"]  # of the prompt that both have
    assert (trace["question"], trace["reference"]) == ("6 - 3?", "3")
    assert trace["before"] == {"text": "<think>6 - 3 = 3</think>\n3", "right": True, "tokens": 23}
    assert trace["after"] == {"text": "3", "right": True, "tokens": 3}


def test_records_are_written_and_shown(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_curve, "FOLDER", tmp_path / "records")
    real_curve.main(["record", str(run)])
    real_curve.main(["show", "--picture", str(tmp_path / "curve.png")])
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if "|" in line]
    assert ["grpo-0", "0", "0.250", "1.000", "25.0", "", "0.00"] in rows
    assert ["grpo-0", "2", "0.500", "1.000", "20.0", "", "1.00"] in rows
    assert ["6 - 3?", "3", "23: `<think>6 - 3 = 3</think>\\n3`", "3: `3`"] in rows
    assert real_curve.shown({"text": "a|`", "right": False, "tokens": 2}) == "2 wrong: `a/'`"
    assert (tmp_path / "curve.png").stat().st_size > 10_000
