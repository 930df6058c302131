import subprocess
import sys

import pytest

from iapo.metrics.console import Progress, ProgressConsole
from iapo.metrics.file import MetricsFile
from iapo.metrics.training import reward_metrics
from iapo.metrics.validation import Validation, mean_of, validation, validations
from iapo.tools.report import draw, main, table


def held_out(accuracy, tokens, rate=None):
    data = {
        "val-core/gsm8k/acc/mean@1": accuracy,
        "val-aux/gsm8k/response_length/mean@1": tokens,
        "val-aux/gsm8k/acc_success_only/mean@1": 9.0,
    }
    return data if rate is None else data | {"val-aux/gsm8k/information_rate/mean@1": rate}


def make_run(run_dir, *entries):
    file = MetricsFile(run_dir / "metrics.jsonl", 0)
    for step, data in entries:
        file.log(data, step)
    file.finish()


def test_validations_and_table_by_hand(tmp_path):
    make_run(tmp_path, (0, held_out(0.8, 50.0, 0.01)), (1, {"actor/loss": 1.0}), (2, held_out(0.79, 40.0, 0.02)))
    found = validations(tmp_path)
    assert found == [Validation(0, 0.8, 50.0, 0.01), Validation(2, 0.79, 40.0, 0.02)]
    lines = table(found[0], found[-1]).splitlines()
    assert lines[2].split() == ["held-out", "accuracy", "0.800", "0.790", "-1.0", "points"]
    assert lines[3].split() == ["mean", "response", "tokens", "50.0", "40.0", "-20.0%"]
    assert lines[4].split() == ["information", "rate", "(nats/token)", "0.0100", "0.0200", "+100.0%"]


def test_several_data_sources_count_equally():
    data = held_out(0.8, 50.0) | {"val-core/math/acc/mean@1": 0.4, "val-aux/math/response_length/mean@1": 100.0}
    assert validation(3, data) == Validation(3, 0.6000000000000001, 75.0, None)


def test_prompts_that_lost_completions_are_no_source_of_their_own():
    """verl averages them apart: 300 tokens over the prompts with all 8, 1000 over those that kept 7."""
    lost = {f"val-aux/a/response_length/mean@{n}": tokens for n, tokens in ((8, 300.0), (7, 1000.0))}
    other = {"val-aux/b/response_length/mean@4": 100.0, "val-aux/b/response_length/mean@10": 200.0}
    assert mean_of(lost, "response_length") == 300
    assert mean_of(lost | other, "response_length") == 250
    assert mean_of({}, "acc") is None


def test_picture_and_command(tmp_path, capsys):
    make_run(tmp_path / "a", (0, held_out(0.8, 50.0)), (2, held_out(0.79, 40.0)))
    make_run(tmp_path / "b", (0, held_out(0.8, 50.0)))
    picture = tmp_path / "p.png"
    draw({"a": validations(tmp_path / "a")}, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([str(tmp_path / "a")]) == 0 and "-20.0%" in capsys.readouterr().out
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metrics.jsonl").write_text("garbage\n")
    for run_dir, message in (
        (tmp_path / "b", "has 1 validation"),
        (tmp_path / "c", "holds no metrics.jsonl"),
        (picture, "is a file; give the folder of a run."),
        (tmp_path / "d", "not the metrics of a run"),
    ):
        assert main([str(run_dir)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"iapo.report: {run_dir}") and message in line and "; " in line


@pytest.mark.parametrize("module", ["iapo.report", "iapo.tools.report", "iapo.evaluation", "iapo.tools.evaluate"])
def test_the_modules_are_commands(tmp_path, module):
    bad = subprocess.run([sys.executable, "-m", module, tmp_path], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.startswith(f"iapo.{'report' if 'report' in module else 'evaluate'}: {tmp_path}: holds no ")


@pytest.mark.parametrize("name", ["no/folder.png", "picture.foo"])
def test_a_picture_that_cannot_be_written_gets_one_line(tmp_path, name, capsys):
    make_run(tmp_path, (0, held_out(0.8, 50.0)), (2, held_out(0.79, 40.0)))
    assert main([str(tmp_path), "--picture", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"iapo.report: --picture: {tmp_path / name} can't be written (")


def test_console_shows_progress_and_time_left(capsys, monkeypatch):
    now = iter([100.0, 130.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    console = ProgressConsole(total_steps=12, score="first_token_entropy", format="tags")
    console.log({"training/global_step": 3, "timing_s/step": 60.0}, step=3)  # the first after a resume
    assert capsys.readouterr().out == "iapo: step 3/12 | s/step 60.0\n"
    console.log({"training/global_step": 5, "iapo/reward/acc": 0.5, "response_length/mean": 40.25}, step=5)
    # 30 s for 2 steps, 7 steps to go
    assert capsys.readouterr().out == "iapo: step 5/12 | accuracy 0.500 | tokens 40.2 | 1:45 left\n"
    console.log(held_out(0.8, 50.0), step=0)
    assert capsys.readouterr().out == "iapo: held-out: accuracy 0.800 tokens 50.0\n"


def test_console_says_once_why_nothing_is_learned(capsys):
    console = ProgressConsole(total_steps=12, score="first_token_entropy", format="tags")
    infos = [{"acc": 0.0, "failure_reason": "no_answer"}] * 3
    console.log(reward_metrics([*infos, {"acc": 1.0, "failure_reason": ""}]), step=1)
    assert len(capsys.readouterr().out.splitlines()) == 1
    for step in (2, 3):
        console.log(reward_metrics(infos) | {"iapo/information_rate": -0.01}, step=step)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # two of the steps
    assert lines[1].startswith("iapo: step 2: no completion was judged, all are 'no_answer': none has an answer in")
    assert lines[2].startswith(
        "iapo: step 2: information is negative on average: after the reasoning the model is less"
    )
    assert "; try iapo.score=reference_answer. See" in lines[2]
    assert "layout" in lines[2]
    console = ProgressConsole(total_steps=12, score="answer_logprob", format="tags")  # of all tokens
    console.log({"iapo/information_rate": -0.01}, step=1)
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert "the model is less certain than before it; try iapo.score=reference_answer" in line
    console = ProgressConsole(
        total_steps=12, score="reference_answer", format="tags"
    )  # nothing to try that isn't chosen
    console.log({"iapo/information_rate": -0.01}, step=1)
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert "the right answer is less probable than before" in line and "iapo.score" not in line
    assert line.endswith("the rate counts in right ones alone; begin with iapo warmup if few are. See docs/metrics.md.")


def test_console_says_that_no_completion_has_the_format(capsys):
    """Also where the reasons differ, so that no single one is all of them; once, and not where one has it."""
    console = ProgressConsole(total_steps=12, score="first_token_entropy", format="tags")
    reasons = ["no_answer", "several_answers"]
    mixed = [{"acc": 0.0, "format": 0.0, "failure_reason": reason} for reason in reasons]
    console.log(reward_metrics([*mixed, {"acc": 1.0, "format": 1.0, "failure_reason": ""}]), step=1)
    assert len(capsys.readouterr().out.splitlines()) == 1
    for step in (2, 3):
        console.log(reward_metrics(mixed), step=step)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("iapo: step 2: no completion has the format; begin with iapo warmup, or choose")


def test_iapo_warmup_is_the_way_out_of_its_own_format_alone(capsys):
    data = {"iapo/reward/no_answer": 1.0, "iapo/reward/format": 0.0, "iapo/information_rate": -0.1}
    for format, named in (("tags", 2), ("boxed", 0), ("boxed_no_think", 0)):
        ProgressConsole(total_steps=1, score="reference_answer", format=format).log(data, step=1)
        said = capsys.readouterr().out
        assert said.count("iapo warmup") == named
        assert said.count("choose the format= that the model knows.") == 1


def test_shares_of_failures_are_metrics():
    reasons = ["no_answer", "timeout", "error: MemoryError", "error: ValueError", "", "", "", ""]
    metrics = reward_metrics([{"failure_reason": reason} for reason in reasons])
    assert metrics == {"iapo/reward/no_answer": 1 / 8, "iapo/reward/timeout": 1 / 8, "iapo/reward/error": 1 / 4}
    assert reward_metrics([{"acc": 1}]) == {"iapo/reward/acc": 1}


def test_long_work_shows_what_is_done_and_the_time_left(capsys, monkeypatch):
    now = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress = Progress("validation")
    for done in (1, 4, 5, 8):
        progress.show(done, 16)
    assert capsys.readouterr().out.splitlines() == [
        "iapo: validation: 4 of 16 prompts, 1:33 left",  # 31 s for 4
        "iapo: validation: 8 of 16 prompts, 1:02 left",
    ]


def test_a_rate_below_zero_has_no_percent():
    before, after = Validation(0, 0.5, 100.0, -0.01), Validation(9, 0.5, 50.0, 0.0223)
    rate = table(before, after).splitlines()[-1]
    assert rate.split()[-1] == "+0.0323" and "%" not in rate
    assert table(before, after).splitlines()[-2].endswith("-50.0%")
