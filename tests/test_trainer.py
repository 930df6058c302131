"""What the trainer adds to verl's, without a cluster; the step itself is tested in test_end_to_end.py."""

import json
import math
import re
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import kl_penalty
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tensordict_utils import assign_non_tensor
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested

from iapo.answer_format import FORMATS
from iapo.config import IapoConfig
from iapo.launch.compose import checked_config, resolve
from iapo.verl_adapter.old_log_probs import needs_old_log_probs
from iapo.verl_adapter.replay_buffer import NO_COMPLETION, IapoReplayBuffer, NoCompletion
from iapo.verl_adapter.rows import fetch, order_rows, pad_with_last, separated
from iapo.verl_adapter.trainer import MAX_REFILLS, IapoTrainer
from iapo.verl_adapter.worker import actor_loss, kl_beyond_cut


def test_dynamic_sampling_that_finds_no_mixed_group_stops_with_the_reason(monkeypatch):
    drawn = []
    monkeypatch.setattr(PPOTrainerSync, "_add_prompts_to_generate", lambda self, n: drawn.append(n) or n)
    trainer = object.__new__(IapoTrainer)
    trainer.config = OmegaConf.create({"data": {"train_batch_size": 4}})
    trainer.global_steps, trainer.refilled = 7, 0
    for _ in range(MAX_REFILLS * 2):
        assert trainer._add_prompts_to_generate(2) == 2
    with pytest.raises(RuntimeError, match=r"^algorithm\.filter_groups: 400 extra prompts of step 7 .*enable=false"):
        trainer._add_prompts_to_generate(2)
    assert sum(drawn) == MAX_REFILLS * 4  # the refused ones were not drawn


def make_buffer(on_batch, poll_interval=None):
    verls = ReplayBuffer(
        "sync", {}, None, "drop", {}, refill_fn=lambda n: n, filter_groups_metric="acc", train_batch_size=4
    )
    return verls, IapoReplayBuffer(verls, on_batch, poll_interval)


def test_the_buffer_is_verls_with_its_arguments():
    verls, ours = make_buffer(print, poll_interval=0.1)
    own = {"poll_interval", "on_batch", "_progress", "_asked"}
    assert {k: v for k, v in vars(ours).items() if k not in own} == {
        k: v for k, v in vars(verls).items() if k not in own
    }
    assert (verls.poll_interval, ours.poll_interval, make_buffer(print)[1].poll_interval) == (2.0, 0.1, 2.0)


@pytest.mark.parametrize(
    "verls,ours",
    [
        (NO_COMPLETION + " Enable it.", "^rollout: none of the 4 prompts of step 7 gave a completion; the first error"),
        ("something else", "^something else$"),
    ],
)
def test_a_step_whose_rollouts_all_failed_stops_with_the_reason(monkeypatch, verls, ours):
    def sample(self, **_):
        raise RuntimeError(verls)

    monkeypatch.setattr(ReplayBuffer, "sample", sample)
    buffer = make_buffer(lambda *_: pytest.fail("there is no batch"))[1]
    with pytest.raises(RuntimeError, match=ours):
        buffer.sample(global_steps=7, partition_id="train", batch_size=4)


def test_every_batch_is_shown_and_an_empty_one_stops_the_run(monkeypatch):
    batches = [KVBatchMeta(keys=["a_0_0"], tags=[{}], partition_id="train"), KVBatchMeta(keys=[], tags=[])]
    monkeypatch.setattr(ReplayBuffer, "sample", lambda self, **_: (batches.pop(0), {"x": 1}))
    shown = []
    buffer = make_buffer(lambda *arguments: shown.append(arguments))[1]
    batch, _metrics = buffer.sample(global_steps=7, partition_id="train", batch_size=4)
    assert shown == [(batch, {"x": 1}, 4)]
    with pytest.raises(NoCompletion, match="none of the 4 prompts of step 8"):
        buffer.sample(global_steps=8, partition_id="val", batch_size=4)


@pytest.mark.parametrize(
    "weights,bypass,shares",
    [(dict(alpha=1.0), None, True), (dict(rho=1.0), False, True), (dict(alpha=1.0), True, False), ({}, None, False)],
)
def test_exit_entropies_come_with_old_log_probs_if_verl_computes_any(monkeypatch, weights, bypass, shares):
    requests = []

    def compute_old_log_prob(self, batch, metrics):
        requests.append(dict(batch.extra_info))
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_compute_old_log_prob", compute_old_log_prob)
    trainer = object.__new__(IapoTrainer)
    correction = {} if bypass is None else {"rollout_correction": {"bypass_mode": bypass}}
    trainer.config = OmegaConf.create({"algorithm": {"adv_estimator": "iapo", **correction}})
    trainer.skips_old_log_prob = False
    monkeypatch.setattr(IapoTrainer, "reads", lambda *_: nullcontext())
    trainer.iapo, trainer.timing_raw = IapoConfig(share_log_prob_forward=True, **weights), {}
    batch = SimpleNamespace(extra_info={})
    assert trainer._compute_old_log_prob(batch, {}) is batch
    asked = replace(trainer.iapo, probe_at="stride" if "alpha" in weights else "ends")  # the rate reads the ends alone
    assert requests == ([{"iapo": asdict(asked)}] if shares else [{}])
    assert batch.extra_info == {}  # reference log-probs may be the same worker's
    trainer.iapo = IapoConfig(share_log_prob_forward=False, **weights)
    assert not trainer.shares_forward


def test_jagged_rows_are_filled_up_with_their_last_value():
    rows = torch.nested.as_nested_tensor([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], layout=torch.jagged)
    assert pad_with_last(rows).tolist() == [[3.0, 1.0], [2.0, 2.0]]


def test_rows_are_ordered_by_prompt_and_rollout():
    keys = ["u_1_0", "v_0_0", "u_0_0", "w_10_0", "w_9_0"]
    batch = KVBatchMeta(keys=keys, tags=[{"n": n} for n in range(5)], partition_id="train")
    order_rows(batch, ["7", "3", "7", "5", "5"])
    assert batch.keys == ["v_0_0", "w_9_0", "w_10_0", "u_0_0", "u_1_0"]
    assert [tag["n"] for tag in batch.tags] == [1, 4, 3, 2, 0]


@pytest.mark.parametrize(
    "overrides,needed",
    [
        # One update by GRPO, and nothing else that reads them.
        (["variant=grpo"], False),
        (["variant=dr_grpo"], False),
        (["variant=length_penalty"], False),
        (["variant=dapo", "actor_rollout_ref.actor.ppo_mini_batch_size=16"], False),
        (["variant=iapo", "iapo.alpha=0", "iapo.beta=0"], False),
        # Terms, methods and probes that do.
        (["variant=iapo"], True),
        (["variant=iapo_rate"], True),
        (["variant=iapo_ne", "iapo.beta=0"], True),
        (["variant=iapo", "iapo.alpha=0"], True),
        (["variant=gtpo"], True),
        (["variant=top_entropy"], True),
        # Several updates, and verl's own readers.
        (["variant=dapo"], True),
        (["variant=grpo", "actor_rollout_ref.actor.ppo_mini_batch_size=8"], True),
        (["variant=grpo", "actor_rollout_ref.actor.ppo_epochs=2"], True),
        (["variant=grpo", "actor_rollout_ref.rollout.calculate_log_probs=true"], True),
        (["variant=grpo", "algorithm.use_kl_in_reward=true"], True),
    ],
)
def test_old_log_probs_are_left_out_where_nothing_reads_them(overrides, needed):
    config = checked_config(["platform=cpu", "model=tiny", *overrides], files=False)
    assert needs_old_log_probs(config) == needed
    assert config.actor_rollout_ref.actor.calculate_entropy != needed  # so that the metric is there all the same


def jagged_of(*rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_without_old_log_probs_the_loss_is_that_of_the_policy_itself():
    """Value and gradient of verl's loss, with the old policy's log-probs and without them."""
    config = resolve(["platform=cpu", "model=tiny", "variant=grpo"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    log_probs = [[-0.3, -1.2, -0.7, -0.1], [-2.0, -0.4, -0.9]]
    results = []
    for own in (False, True):
        leaves = [torch.tensor(row, requires_grad=True) for row in log_probs]
        output = {"log_probs": torch.nested.as_nested_tensor(leaves, layout=torch.jagged)}
        mask = jagged_of([1, 1], [1])
        fields = {
            "prompts": jagged_of([1, 2], [1, 2]),
            "responses": jagged_of([3, 4], [5]),
            "response_mask": mask,
            "advantages": jagged_of([0.5, -1.0], [2.0]),
            "ref_log_prob": jagged_of([-1.0, -0.5], [-0.2]),
        }
        if not own:
            fields["old_log_probs"] = response_from_nested(output["log_probs"].detach(), mask)
        data = TensorDict(fields, batch_size=2)
        numbers = dict(dp_size=1, batch_num_tokens=3, global_batch_size=2, max_response_len=2)
        assign_non_tensor(data, **numbers)
        loss, metrics = actor_loss(partial(ppo_loss, config=actor), output, data)
        assert metrics["actor/kl_beyond_cut"].aggregate() == 0
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(map(torch.equal, *results)) and any(gradient.any() for gradient in results[0][1:])


@pytest.mark.parametrize(
    "processor,replays,teacher,limited",
    [
        (None, False, False, True),
        ("images", False, False, False),
        (None, True, False, False),
        (None, False, True, False),
    ],
)
def test_workers_fetch_all_where_more_than_text_is_read(processor, replays, teacher, limited):
    trainer = object.__new__(IapoTrainer)
    trainer.processor, trainer.use_teacher_policy = processor, teacher
    rollout = {"enable_rollout_routing_replay": replays}
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})
    batch = KVBatchMeta(keys=["a_0_0"], tags=[{}], partition_id="train")
    with trainer.reads(batch, ["responses"]):
        assert batch.fields == (["responses"] if limited else None)
    assert batch.fields is None


def test_the_share_of_tokens_beyond_verls_cut_of_the_kl():
    """Where the gradient of verl's estimate is exactly 0, by verl's own function."""
    ratios = torch.tensor([1.0, 13.6, 13.7, 40.0, math.exp(-10.9), math.exp(-11.1), 100.0])
    log_probs = torch.zeros(7, requires_grad=True)
    estimate = kl_penalty(log_probs, ratios.log(), "low_var_kl")
    (gradient,) = torch.autograd.grad(estimate.sum(), log_probs)
    assert (gradient == 0).tolist() == [True, False, True, True, False, True, True]  # of the first it is 0 truly
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0])
    assert kl_beyond_cut(log_probs.detach(), ratios.log(), mask) == pytest.approx(3 / 6)
    assert kl_beyond_cut(log_probs.detach(), ratios.log(), torch.zeros(7)) == 0
    plus = kl_penalty(log_probs, ratios.log(), "low_var_kl+")
    (gradient,) = torch.autograd.grad(plus.sum(), log_probs)
    assert torch.equal(plus, estimate) and (gradient != 0).tolist() == [False, *[True] * 6]


@pytest.mark.parametrize("rows,fields,message", [(1, ["a"], "holds 1 of 2 rows of"), (2, [], "holds no a for")])
def test_what_is_fetched_must_have_every_row_and_field(monkeypatch, rows, fields, message):
    stored = TensorDict({name: torch.zeros(rows) for name in fields}, batch_size=rows)
    monkeypatch.setattr("transfer_queue.kv_batch_get", lambda **_: stored)
    with pytest.raises(RuntimeError, match=f"^TransferQueue {message} "):
        fetch(KVBatchMeta(keys=["a_0_0", "a_1_0"], tags=[{}, {}], partition_id="train"), ["a"])


@pytest.mark.parametrize(
    "resumed,steps,val_only,validates",
    [
        (4, [0, 4], False, False),  # the checkpoint's own validation is in the file
        (4, [0], False, True),
        (4, [0, 4], True, True),  # which asks for nothing else
        (0, [0], False, True),  # a run that starts from the beginning; its old lines are put aside
        (4, None, False, True),
    ],
)
def test_a_resumed_run_does_not_validate_again(monkeypatch, tmp_path, resumed, steps, val_only, validates):
    if steps is not None:
        numbers = {"val-core/a/acc/mean@1": 0.5, "val-aux/a/response_length/mean@1": 9.0}
        lines = [json.dumps({"step": step, "data": numbers}) + "\n" for step in steps]
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
    trainer = object.__new__(IapoTrainer)
    trainer.resumed_step = resumed
    options = {"val_only": val_only, "val_before_train": True}
    trainer.config = OmegaConf.create({"run_dir": str(tmp_path), "trainer": options})
    monkeypatch.setattr(PPOTrainerSync, "fit", lambda self, manager: None)
    trainer.fit(None)
    assert trainer.config.trainer.val_before_train == validates


class Letters:
    """A tokenizer of one token per character; `>1` is one token too."""

    def encode(self, text, add_special_tokens):
        return [1000 if piece == ">1" else ord(piece) for piece in re.findall(">1|.", text, re.DOTALL)]


def test_right_answers_reach_the_workers_in_the_order_of_the_rows(monkeypatch):
    """Each with what ends it; a list as several; fetched in the store's order, put in that of prompts and rollouts."""
    trainer, stored, asked = object.__new__(IapoTrainer), {}, []
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": 2}}})
    trainer.tokenizer, trainer.global_steps = Letters(), 1
    truths = {"b_1_0": "22", "a_0_0": ["3", 44], "b_0_0": "22", "a_1_0": ["3", 44]}

    def fetch_fields(batch, fields):
        asked.append(fields)
        values = {
            "index": [{"a": 1, "b": 2}[key[0]] for key in batch.keys],
            "extra_fields": [{}] * 4,
            "reward_model": [{"ground_truth": truths[key]} for key in batch.keys],
        }
        return {field: values[field] for field in fields}

    monkeypatch.setattr("iapo.verl_adapter.trainer.fetch", fetch_fields)
    monkeypatch.setattr("iapo.verl_adapter.trainer.put", lambda batch, **fields: stored.update(fields))
    for score in ("first_token_entropy", "reference_answer"):
        trainer.iapo = IapoConfig(rho=1.0, score=score, probe=">", answer_end="<")
        batch = KVBatchMeta(keys=list(truths), tags=[{}] * 4, partition_id="train")
        trainer.on_batch(batch, {}, 2)
        assert ("reward_model" in asked[-1]) == bool(stored) == (score == "reference_answer")
    assert batch.keys == ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
    rows = [[answer.tolist() for answer in separated(row)] for row in stored["reference_tokens"].unbind()]
    assert rows == [[[*map(ord, "3<")], [*map(ord, "44<")]]] * 2 + [[[*map(ord, "22<")]]] * 2


@pytest.mark.parametrize("name,text", [("tags", "72</answer>"), ("boxed", "72}"), ("boxed_no_think", "72}")])
def test_a_right_answer_ends_as_its_format_ends_answers(name, text):
    trainer, given = object.__new__(IapoTrainer), FORMATS[name]
    trainer.tokenizer = Letters()
    trainer.iapo = IapoConfig(
        score="reference_answer",
        format=name,
        **{key: getattr(given, key) for key in ("exit_marker", "probe", "answer_end")},
    )
    assert [answer.tolist() for answer in separated(trainer.reference_ids({"ground_truth": "72"}))] == [
        [*map(ord, text)]
    ]


def test_completions_that_a_validation_lacks_are_counted(monkeypatch):
    """verl counts them as wrong in its accuracy, and drops what sampling reports of them."""
    trainer = object.__new__(IapoTrainer)
    trainer.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": 8, "val_kwargs": {"n": 2}}}})
    trainer.iapo, trainer.validation_failures = IapoConfig(), 5
    values = {"index": [1, 1, 2], "extra_fields": [{}] * 3}
    monkeypatch.setattr("iapo.verl_adapter.trainer.fetch", lambda batch, fields: {f: values[f] for f in fields})

    def validate(self):
        for _ in range(2):
            batch = KVBatchMeta(keys=["a_0_0", "a_1_0", "b_0_0"], tags=[{}] * 3, partition_id="val")
            self.on_batch(batch, {}, 2)
        return {"val-core/a/acc/mean@2": 0.5}

    monkeypatch.setattr(PPOTrainerSync, "_validate", validate)
    assert trainer._validate() == {"val-core/a/acc/mean@2": 0.5, "iapo/validation_rollout_failures": 2}
