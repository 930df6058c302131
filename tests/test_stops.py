"""Real runs that are stopped, fail or are refused. In a file of its own, so that they run next to the longer ones."""

import json
import re
import signal
import time

import pytest

from tests.runs import segments

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_a_reward_that_raises_stops_the_run_with_one_clear_line(train, tmp_path):
    reward = tmp_path / "broken_reward.py"
    reward.write_text("def compute_score(**_):\n    raise KeyError('no such answer')\n")
    settings = [f"reward.custom_reward_function.path={reward}", "trainer.total_training_steps=2"]
    for run in [train(f"variant={name}", *settings, folder=name) for name in ("iapo_rate", "dapo")]:
        assert run.wait() == 1, run.tail()
        last = run.tail(1)
        expected = "iapo.train: the run failed: RuntimeError: reward: the reward function raised on 16 of 16"
        assert last.startswith(expected)
        assert "KeyError: 'no such answer'" in last
        assert not run.wait_until_gone(), "processes are left behind"


def test_a_wrong_configuration_stops_before_ray(train):
    run = train("iapo.rho=-1")
    assert run.wait(60) == 2
    assert run.tail(1) == "iapo.train: iapo.rho: -1 must be a number >= 0."
    missing = train("model=/no/such/model", folder="missing")
    assert missing.wait(60) == 2
    assert missing.tail(1).startswith("iapo.train: actor_rollout_ref.model.path: /no/such/model is no folder")
    assert not (missing.folder / "config.yaml").exists()


def test_a_polite_stop_leaves_nothing_behind(train):
    before = segments()
    run = train("trainer.total_training_steps=50")
    run.wait_for(lambda: (run.folder / "metrics.jsonl").is_file() and run.metrics())
    second = train("trainer.total_training_steps=50")  # in the same folder
    assert second.wait(60) == 2
    assert f"is in use by a run that is still alive (process {run.process.pid} on " in second.tail(1)
    run.process.terminate()
    assert run.wait(60) == 143
    assert not run.wait_until_gone()
    assert segments() <= before
    assert json.loads((run.folder / "starts.jsonl").read_text())["versions"]["verl"] == "0.9.1"


@pytest.mark.parametrize(
    "number,last",
    [
        (signal.SIGTERM, "iapo.train: stopped by SIGTERM; the same command starts anew: no checkpoint yet"),
        (signal.SIGINT, "iapo.train: interrupted; the same command starts anew: no checkpoint yet"),
    ],
)
def test_a_stop_while_ray_starts_is_as_polite(train, number, last):
    run = train("trainer.total_training_steps=50")
    run.wait_for(lambda: "ray init kwargs" in run.log.read_text())
    time.sleep(1)
    run.process.send_signal(number)
    assert run.wait(60) == 128 + number
    # A handler of Ray's that happens to run in a callback of Python's own, where an exception is printed and lost.
    ignored = r"Exception ignored in.*\nTraceback.*\n(  .*\n)+(SystemExit|KeyboardInterrupt).*\n"
    assert run.tail(1) == last and "Traceback" not in re.sub(ignored, "", run.log.read_text())
    assert not run.wait_until_gone()
