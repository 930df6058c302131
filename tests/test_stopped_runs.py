"""Real runs that are killed, stopped or refused, or that fail. A file of its own, so that it runs beside the others."""

import json
import os
import re
import signal
import time

import pytest
import torch

from tests.runs import finished, left_behind, segments

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_a_killed_run_resumes_and_ends_where_an_unbroken_one_does(train):
    # A method that learns as it goes, too.
    steps = ["variant=[iapo_rate,gfpo]", "methods.gfpo.adaptive=[3,3,2,2]"]
    # And a score that needs the data's right answers in the workers.
    steps += ["iapo.score=reference_answer", "iapo.probe_tokens=natural"]
    steps += ["trainer.total_training_steps=4", "trainer.save_freq=2"]
    unbroken, run = train(*steps, folder="unbroken"), train(*steps, folder="killed")
    tracker = run.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    run.wait_for(lambda: tracker.is_file() and tracker.read_text() == "2" and 2 in run.metrics())
    os.kill(run.process.pid, signal.SIGKILL)
    run.wait()
    run.kill()
    before = (run.folder / "metrics.jsonl").read_bytes().splitlines()

    resumed = finished(train(*steps, folder="killed"))
    finished(unbroken)
    after = (resumed.folder / "metrics.jsonl").read_bytes().splitlines()
    assert after[:2] == before[:2], "the first process's lines changed"
    assert list(resumed.metrics()) == [1, 2, 3, 4]
    # Same prompts, same rollouts, same optimizer state: the same numbers, to rounding.
    for step in (3, 4):
        for name in ("critic/score/mean", "response_length/mean", "actor/pg_loss", "actor/grad_norm", "actor/lr"):
            expected = unbroken.metrics()[step][name]
            assert resumed.metrics()[step][name] == pytest.approx(expected, rel=1e-4, abs=1e-6), (step, name)

    def weights(folder):
        shard = folder / "checkpoints" / "global_step_4" / "actor" / "model_world_size_1_rank_0.pt"
        state = torch.load(shard, weights_only=False)
        return {name: getattr(value, "_local_tensor", value) for name, value in state.items()}

    learned = [run.folder / "checkpoints" / "global_step_4" / "methods.json" for run in (unbroken, resumed)]
    states = [path.read_text() for path in learned]
    assert states[0] == states[1] and sum(count for _, count in json.loads(states[0])["gfpo"]["seen"]) == 16
    first, second = weights(unbroken.folder), weights(resumed.folder)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["iapo_rate", pytest.param("dapo", marks=pytest.mark.faults)])
def test_a_reward_that_raises_stops_the_run_with_one_clear_line(train, tmp_path, variant):
    reward = tmp_path / "broken_reward.py"
    reward.write_text("def compute_score(**_):\n    raise KeyError('no such answer')\n")
    settings = [f"reward.custom_reward_function.path={reward}", "trainer.total_training_steps=2"]
    run = train(f"variant={variant}", *settings)
    assert run.wait() == 1, run.tail()
    last = run.tail(1)
    assert last.startswith("iapo.train: the run failed: RuntimeError: reward: the reward function raised on 16 of 16")
    assert "KeyError: 'no such answer'" in last
    assert not run.wait_until_gone(), "processes are left behind"


def test_a_wrong_configuration_stops_before_ray(train):
    run = train("iapo.rho=-1")
    assert run.wait(120) == 2
    assert run.tail(1) == "iapo.train: iapo.rho: -1 must be a number >= 0."
    missing = train("model=/no/such/model", folder="missing")
    assert missing.wait(120) == 2
    assert missing.tail(1).startswith("iapo.train: actor_rollout_ref.model.path: /no/such/model is no folder")
    assert not (missing.folder / "config.yaml").exists()


def test_a_polite_stop_leaves_nothing_behind(train):
    before = segments()
    run = train("trainer.total_training_steps=50")
    run.wait_for(lambda: (run.folder / "metrics.jsonl").is_file() and run.metrics())
    second = train("trainer.total_training_steps=50")  # in the same folder
    assert second.wait(120) == 2
    assert f"is in use by a run that is still alive (process {run.process.pid} on " in second.tail(1)
    run.process.terminate()
    assert run.wait(120) == 143
    assert not run.wait_until_gone()
    assert not left_behind(before), "shared memory"
    assert json.loads((run.folder / "starts.jsonl").read_text())["versions"]["verl"] == "0.9.1"


@pytest.mark.parametrize(
    "number,last",
    [
        (
            signal.SIGTERM,
            "iapo.train: stopped by SIGTERM; the same command starts over: no checkpoint yet",
        ),
        pytest.param(
            signal.SIGINT,
            "iapo.train: interrupted; the same command starts over: no checkpoint yet",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_a_stop_while_ray_starts_is_as_polite(train, number, last):
    run = train("trainer.total_training_steps=50")
    run.wait_for(lambda: "ray init kwargs" in run.log.read_text())
    time.sleep(1)
    run.process.send_signal(number)
    assert run.wait(120) == 128 + number
    # A handler of Ray's that happens to run in a callback of Python's own, where an exception is printed and lost.
    ignored = r"Exception ignored in.*\nTraceback.*\n(  .*\n)+(SystemExit|KeyboardInterrupt).*\n"
    assert run.tail(1) == last and "Traceback" not in re.sub(ignored, "", run.log.read_text())
    assert not run.wait_until_gone()
