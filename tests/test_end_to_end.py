"""Real runs: verl's trainer, Ray, FSDP2 and a vLLM server on a CPU. A minute each; skip with -m "not e2e"."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.runs import finished, left_behind, segments

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture
def socket_of_another_run():
    """What a run with a Ray of its own would use if verl chose the name: a run removes it when it sends weights."""
    path = Path("/tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock")
    path.touch()
    yield path
    path.unlink(missing_ok=True)


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
    assert not left_behind(before), "shared memory"
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
    assert metrics[2]["actor/ppo_kl"] != 0  # several updates, so that ratios leave 1; the first step's rate is 0
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


# Every method acts in a real run. Those that act by different hooks share one. The suite has gfpo's, in the run that is
# killed and resumes. A recipe that is not listed here, and has no test of its own above, runs alone.
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


@pytest.mark.methods
@pytest.mark.parametrize("pair", TOGETHER)
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
