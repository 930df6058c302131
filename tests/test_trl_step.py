"""The parts of benchmarks.trl_step that need no TRL; what it measures is in benchmarks/README.md."""

import asyncio
import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import trl_step
from iapo.reward import compute_score

GOOD = "<think>5+5=10</think>\n<answer>10</answer>"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "train.parquet"
    path.touch()
    return path


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        (GOOD, "10", 1.5),
        (f" {GOOD}\n", "10", 1.5),
        (GOOD, "11", -0.5),
        ("<answer>10</answer>", "10", 0.5),
        ("<think>5+5=10</think><answer>10</answer>", "10", 0.5),
        ("<think></think>\n<answer> 010 </answer>", "10", 1.5),
        (f"{GOOD}<answer>10</answer>", "10", -1.5),
        ("<think></think>\n<answer></answer>", "10", -0.5),
        ("</answer>10<answer>", "10", -1.5),
        ("<think>5+5=10", "10", -1.5),
        ("", "10", -1.5),
    ],
)
def test_the_reward_is_ours(text, truth, expected):
    assert trl_step.reward(text, truth) == expected
    assert asyncio.run(compute_score("", text, truth))["score"] == expected


def test_an_answer_that_is_no_integer_is_wrong():
    assert trl_step.reward("<think></think>\n<answer>10+</answer>", "10") == -0.5


def test_rewards_are_called_as_trl_calls_them():
    chats = [[{"role": "assistant", "content": text}] for text in (GOOD, "")]
    assert trl_step.rewards(prompts=[], completions=chats, ground_truth=["10", "10"], trainer_state=None) == [1.5, -1.5]


def test_a_row_of_the_task_becomes_an_example():
    prompt = [{"role": "user", "content": "5+5="}]
    row = {"prompt": prompt, "reward_model": {"style": "rule", "ground_truth": "10"}}
    assert trl_step.examples([row]) == [{"prompt": prompt, "ground_truth": "10"}]


@pytest.mark.parametrize("per_device", [128, 32])
def test_a_step_is_one_update_on_all_completions(per_device):
    arguments = trl_step.config_arguments(6, per_device)
    assert arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] == 128
    stated = trl_step.settings(arguments, "tiny", 2, "adamw")
    assert stated["prompts"] * stated["completions_per_prompt"] == 128
    assert stated["completions_per_forward"] == per_device
    assert (stated["kl"], stated["dtype"], stated["threads"]) == (0.001, "float32", 2)


def test_the_summary_leaves_the_first_step_out():
    part = {"generate": 1.0, "reference": 0.5, "loss": 0.25, "backward": 0.125}
    steps = [{"step": seconds, **part} for seconds in (9.0, 2.0, 4.0, 3.0)]
    logs = [{"completions/mean_length": length, "reward": 1.0} for length in (100, 50, 60, 70)]
    result = trl_step.summary(steps, logs)
    assert result["seconds"] == [9.0, 2.0, 4.0, 3.0]
    assert (result["median_seconds"], result["mean_completion_tokens"], result["mean_reward"]) == (3.0, 60, 1.0)
    assert result["median_seconds_of_parts"] == {**part, "rest": 1.125}


def test_the_stopwatch_counts_a_part_within_its_step():
    watch = trl_step.Stopwatch()
    sleep = watch.timed("loss", time.sleep)
    for _ in range(2):
        watch.begin()
        sleep(0.01)
        sleep(0.01)
        watch.end()
    assert len(watch.steps) == 2
    for step in watch.steps:
        assert 0.02 <= step["loss"] <= step["step"]
        assert step["generate"] == 0


def test_arguments(prompts, tmp_path, capsys):
    options = trl_step.parse_arguments(["--prompts", str(prompts), "--venv", "there"])
    assert (options.steps, options.threads, options.per_device, options.here) == (6, 2, 128, False)
    assert (options.venv, options.model) == (Path("there"), trl_step.TINY)
    assert (options.model / "config.json").is_file()
    for wrong in (["--steps", "1"], ["--per-device", "48"], ["--prompts", str(tmp_path / "none.parquet")]):
        with pytest.raises(SystemExit):
            trl_step.parse_arguments(["--prompts", str(prompts), *wrong])
    assert "iapo data verbose_arithmetic" in capsys.readouterr().err


def test_pip_gets_the_cpu_build_first_and_keeps_it():
    torch, everything = trl_step.pip_commands(Path("venv/bin/python"))
    assert torch[:3] == everything[:3] == ["venv/bin/python", "-m", "pip"]
    assert f"torch=={trl_step.TORCH}+cpu" in torch and trl_step.CPU_INDEX in torch
    assert {f"torch=={trl_step.TORCH}", *trl_step.PACKAGES} <= set(everything)


def test_a_command_that_fails_says_why_in_one_line(capfd):
    code = "import sys; sys.exit('WARNING: slow\\nERROR: no matching trl\\nbye')"
    with pytest.raises(trl_step.TrlError) as error:
        trl_step.watched([sys.executable, "-S", "-c", code], "installing TRL")
    assert str(error.value) == "installing TRL failed: ERROR: no matching trl (exit status 1)"
    assert capfd.readouterr().err.startswith("trl_step: installing TRL (0 s)\nWARNING: slow\n")


def test_a_slow_command_gives_signs_of_life(capfd, monkeypatch):
    monkeypatch.setattr(trl_step, "INTERVAL_S", 0.05)
    code = "import os, time; time.sleep(0.2); print(os.environ['NAME'])"
    assert trl_step.watched([sys.executable, "-S", "-c", code], "waiting", {"NAME": "value"}) == "value\n"
    assert capfd.readouterr().err.count("trl_step: waiting") > 1


def test_without_an_error_of_pip_the_reason_is_the_last_line():
    assert trl_step.reason("Traceback\n  x\nModuleNotFoundError: no trl\n\n") == "ModuleNotFoundError: no trl"
    assert trl_step.reason("") == "it said nothing"


def test_the_result_is_the_last_line():
    assert trl_step.parse_result('noise\n{"seconds": [1.0]}\n') == {"seconds": [1.0]}
    for output in ("", "noise\n"):
        with pytest.raises(trl_step.TrlError, match="printed no result"):
            trl_step.parse_result(output)


@pytest.mark.parametrize("passive", [False, True])
def test_an_environment_with_trl_is_used_again(tmp_path, prompts, monkeypatch, capsys, passive):
    commands = []

    def fake(command, what, environment=None):
        commands.append((command, environment))
        return json.dumps({"seconds": [2.0, 1.0], "cores_busy_with_others": 0.5})

    monkeypatch.setattr(trl_step, "watched", fake)
    monkeypatch.setattr(trl_step, "has_trl", lambda python: True)
    assert trl_step.measure(2, prompts, venv=tmp_path, threads=3, per_device=64, passive=passive) == [2.0, 1.0]
    [(command, environment)] = commands
    assert command[:3] == [str(tmp_path / "bin" / "python"), "-I", trl_step.__file__]
    options = trl_step.parse_arguments(command[3:])
    assert options.here
    assert (options.steps, options.threads, options.per_device) == (2, 3, 64)
    assert (options.prompts, options.model) == (prompts, trl_step.TINY)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment.get("OMP_WAIT_POLICY") == ("passive" if passive else None)
    assert ("other processes kept 0.5 cores busy" in capsys.readouterr().err) == (not passive)


def test_torch_may_come_from_elsewhere_but_trl_must_come(tmp_path, monkeypatch):
    tried, failing = [], [trl_step.CPU_INDEX]

    def fake(command, what, environment=None):
        tried.append(what)
        if set(failing) & set(command):
            raise trl_step.TrlError(f"{what} failed")

    monkeypatch.setattr(trl_step, "watched", fake)
    assert trl_step.prepare(tmp_path) == tmp_path / "bin" / "python"
    assert tried == ["making an environment for TRL", "installing torch for TRL", "installing TRL"]
    failing.append("install")
    with pytest.raises(trl_step.TrlError, match="installing TRL failed"):
        trl_step.prepare(tmp_path)


def test_a_failure_ends_the_program_with_one_line(prompts, monkeypatch):
    def fail(*_, **__):
        raise trl_step.TrlError("installing TRL failed: ERROR: none")

    monkeypatch.setattr(trl_step, "run_trl", fail)
    with pytest.raises(SystemExit) as error:
        trl_step.main(["--prompts", str(prompts)])
    assert error.value.code == "benchmarks.trl_step: installing TRL failed: ERROR: none"


@pytest.mark.skipif(sys.platform != "linux", reason="counted by Linux")
def test_own_work_is_taken_off_what_all_processes_used(monkeypatch):
    class Stat:
        def __init__(self, _):
            pass

        def read_text(self):
            return "cpu  1000 200 300 99999 77 10 20 30 40 50\ncpu0 1 2 3\n"

    monkeypatch.setattr(trl_step, "Path", Stat)
    monkeypatch.setattr(trl_step.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(trl_step.os, "times", lambda: (1.5, 0.5, 0.0, 0.0, 9.0))
    assert trl_step.cpu_seconds_of_others() == pytest.approx(15.6 - 2.0)
