"""Real runs: verl's trainer, Ray, FSDP2 and a vLLM server on a CPU. A minute each; skip with -m "not e2e"."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.runs import finished, runs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    from iapo.data import prepare

    folder = tmp_path_factory.mktemp("data")
    prepare("verbose_arithmetic", folder)
    return folder


@pytest.fixture
def train(tmp_path, data_dir):
    with runs(tmp_path, data_dir) as start:
        yield start


@pytest.fixture
def socket_of_another_run():
    """What a run with a Ray of its own would use if verl chose the name: a run removes it when it sends weights."""
    path = Path("/tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock")
    path.touch()
    yield path
    path.unlink(missing_ok=True)


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


@pytest.fixture
def fractions(data_dir, tmp_path):
    """The embedded data with the right answers as fractions, so that math-verify judges and not a string match."""
    folder = tmp_path / "fractions"
    folder.mkdir()
    for split in ("train", "test"):
        table = pq.read_table(data_dir / "verbose_arithmetic" / f"{split}.parquet")
        rows = table.to_pylist()
        for row in rows:
            row["reward_model"]["ground_truth"] = f"\\frac{{{2 * int(row['reward_model']['ground_truth'])}}}{{2}}"
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def test_two_ranks_train_with_every_term(train, fractions, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    before = segments()
    run = finished(
        train(
            "variant=iapo",
            f"data={fractions}",
            "data.max_prompt_length=32",
            "data.max_response_length=128",
            "trainer.logger=[console,tensorboard,wandb]",
            "iapo.alpha=0.1",
            "iapo.beta=0.1",
            "iapo.rho=0.1",
            "trainer.n_gpus_per_node=2",
            "trainer.total_training_steps=2",
            "trainer.test_freq=2",
            "trainer.val_before_train=true",
        )
    )
    assert segments() <= before, "shared memory is left behind"
    metrics = run.metrics()
    assert list(metrics) == [0, 1, 2]
    for step in (1, 2):
        shares = {k: v for k, v in metrics[step].items() if k.startswith("iapo/advantage_share/")}
        assert len(shares) == 4 and sum(shares.values()) == pytest.approx(1)
        assert shares["iapo/advantage_share/informativeness"] > 0 and shares["iapo/advantage_share/exploration"] > 0
        for name in (
            "iapo/exit_entropy/start",
            "iapo/information_gain/std",
            "iapo/probe_tokens_per_second",
            "timing_s/exit_entropy",
        ):
            assert metrics[step][name] > 0, name
        # The answer is nearly certain at the end of the reasoning, and the gains add up to what was learned.
        assert metrics[step]["iapo/exit_entropy/end"] < metrics[step]["iapo/exit_entropy/start"]
        assert metrics[step]["iapo/reward/acc"] > 0.3 and metrics[step]["iapo/reward/verify_failure"] == 0
        assert metrics[step]["actor/ppo_kl"] == pytest.approx(0, abs=1e-4)
    for name in (
        "val-core/{}/acc",
        "val-aux/{}/response_length",
        "val-aux/{}/information_rate",
        "val-aux/{}/truncated",
    ):
        assert name.format("verbose_arithmetic") + "/mean@1" in metrics[2]
    for name in ("config.yaml", "starts.jsonl", "validation/0.jsonl", "tensorboard"):
        assert (run.folder / name).exists(), name
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert "held-out accuracy" in run.tail() and "iapo: step 2/2" in run.log.read_text()


def test_zero_weights_train_exactly_as_grpo(train, socket_of_another_run):
    steps = ["trainer.total_training_steps=3"]
    few_tokens = [f"actor_rollout_ref.rollout.{key}=192" for key in ("max_model_len", "max_num_batched_tokens")]
    runs = [
        train("variant=grpo", "algorithm.adv_estimator=grpo", *steps, folder="grpo"),  # verl's own
        # Its prompts don't fit into one forward of the server.
        train("variant=iapo", "iapo.alpha=0", "iapo.beta=0", *few_tokens, *steps, folder="iapo"),
    ]
    grpo, iapo = (finished(run).metrics() for run in runs)
    assert socket_of_another_run.exists()
    names = [
        *(f"critic/advantages/{k}" for k in ("mean", "max", "min")),
        *("actor/pg_loss", "actor/kl_loss", "actor/loss", "actor/grad_norm", "actor/entropy"),
        *("critic/score/mean", "response_length/mean"),
    ]
    for step in (1, 2, 3):
        assert {name: iapo[step][name] for name in names} == {name: grpo[step][name] for name in names}
        assert "timing_s/exit_entropy" not in iapo[step]  # no probe pass
    assert grpo[3]["actor/grad_norm"] > 0


def test_dapo_filters_groups_and_applies_its_own_loss_settings(train):
    run = finished(train("variant=dapo", "trainer.total_training_steps=2", "trainer.save_freq=2"))
    metrics = run.metrics()
    # With groups of four and an accuracy of 0.85 about half of the groups are all right and are replaced.
    assert sum(metrics[step].get("training/filter_groups/evicted_samples", 0) for step in (1, 2)) > 0
    for step in (1, 2):
        # Every group that is left has both right and wrong completions.
        assert 0 < metrics[step]["iapo/reward/acc"] < 1
        assert metrics[step]["critic/advantages/max"] > 0
        assert metrics[step]["iapo/reward/overlong_reward"] <= 0
        assert "actor/kl_loss" not in metrics[step]
    merged = run.folder / "merged"
    result = subprocess.run(
        [sys.executable, "-m", "iapo", "export", run.folder, "--out", merged],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(merged)
    start = AutoModelForCausalLM.from_pretrained(Path(__file__).parent.parent / "iapo" / "assets" / "tiny")
    assert trained.dtype == torch.float32
    changes = [(a - b).abs().max() for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert 0 < max(changes) < 0.01


# Every method acts in a real run. Those that act by different hooks share one. The first run is in the suite; of the
# others two share the machine. A recipe that is not listed here, and has no test of its own above, runs alone.
TOGETHER = [
    ("laser,s_grpo,iapo_ne",),
    ("length_penalty,gfpo,iapo", "top_entropy"),
    ("gtpo,iapo_rate", "dler"),
    ("gtpo_trajectory,grpo_lambda", "grpo_s"),
    ("dr_grpo",),
]
RECIPES = {
    path.stem: yaml.safe_load(path.read_text())
    for path in (Path(__file__).parent.parent / "recipes" / "variant").glob("*.yaml")
}
TOGETHER += [(name,) for name in sorted(set(RECIPES) - {"grpo", "dapo"} - set(re.findall(r"\w+", str(TOGETHER))))]


@pytest.mark.parametrize(
    "pair", [TOGETHER[0], *(pytest.param(pair, marks=pytest.mark.methods) for pair in TOGETHER[1:])]
)
def test_every_method_trains(train, pair):
    runs = []
    for variants in pair:
        extra = ["methods.gfpo.k=2"] * ("gfpo" in variants) + ["methods.laser.adaptive=true"] * ("laser" in variants)
        extra += ["methods.gtpo.zscore_over=side"] * ("gtpo," in variants)
        folder = variants.replace(",", "+")
        runs.append(train(f"variant=[{variants}]", "trainer.total_training_steps=2", *extra, folder=folder))
    for variants, run in zip(pair, runs, strict=True):
        metrics = finished(run).metrics()
        assert list(metrics) == [1, 2]
        methods = set(yaml.safe_load((run.folder / "config.yaml").read_text())["methods"])
        assert methods == {name for name in variants.split(",") if "methods" in RECIPES[name]}
        for step in (1, 2):
            assert math.isfinite(metrics[step]["actor/pg_loss"])
            assert ("iapo/method/tokens_kept" in metrics[step]) == bool(methods)
            if methods & {"gfpo", "s_grpo", "top_entropy"}:
                assert 0 < metrics[step]["iapo/method/tokens_kept"] < 1
            if "gfpo" in methods:
                assert metrics[step]["iapo/method/completions_kept"] == 0.5
        assert max(metrics[step]["actor/grad_norm"] for step in (1, 2)) > 0


@pytest.mark.ranks
def test_neither_fsdp_nor_micro_batches_change_anything(train):
    # A loss over part of the tokens, and a term that is measured in verl's own micro-batches.
    steps = ["variant=[iapo_rate,s_grpo]", "trainer.total_training_steps=2", "trainer.n_gpus_per_node=2"]
    actor = "actor_rollout_ref.actor"
    many, one = (
        train(*steps, f"{actor}.strategy={strategy}", f"{actor}.ppo_max_token_len_per_gpu={limit}", folder=strategy)
        for strategy, limit in (("fsdp", 192), ("fsdp2", 4096))
    )
    assert_equal(many, one)
    # Per rank: more than two micro-batches in one run, one in the other.
    assert all(2 * 192 < step["perf/total_num_tokens"] / 2 <= 4096 for step in many.metrics().values())


def assert_equal(*runs):
    """Two runs of two steps show the same numbers, to rounding."""
    first, second = (finished(run).metrics() for run in runs)
    names = ["iapo/exit_entropy/start", "iapo/information_rate", "actor/entropy", "actor/pg_loss", "actor/grad_norm"]
    for step in (1, 2):
        for name in [*names, "critic/score/mean", "response_length/mean"]:
            assert first[step][name] == pytest.approx(second[step][name], rel=1e-4, abs=1e-6), (step, name)
    assert first[2]["actor/grad_norm"] > 0


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
    assert run.wait(60) == 128 + number
    # A handler of Ray's that happens to run in a callback of Python's own, where an exception is printed and lost.
    ignored = r"Exception ignored in.*\nTraceback.*\n(  .*\n)+(SystemExit|KeyboardInterrupt).*\n"
    assert run.tail(1) == last and "Traceback" not in re.sub(ignored, "", run.log.read_text())
    assert not run.wait_until_gone()
