"""The trainer: verl's synchronous v1 trainer with the exit-entropy pass between old log-probs and the advantage.

With `iapo.share_log_prob_forward` the pass goes with the old log-probs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import ray
import torch
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.utils.debug import marked_timer

from iapo.checkpoints import local_ranks, remove_surplus, resume_point, step_folder
from iapo.config import IapoConfig
from iapo.information import information_rate, next_token_entropies
from iapo.methods import acts_by, load_states, make_methods, save_states
from iapo.metrics.console import ProgressConsole, clock
from iapo.metrics.file import MetricsFile
from iapo.metrics.training import information_metrics, method_metrics, reward_metrics
from iapo.metrics.validation import validations
from iapo.probe.text import answer_ids, region_length
from iapo.step import StepAdvantage, StepInputs
from iapo.tasks.reference import references
from iapo.verl_adapter.engine import INPUT_FIELDS, OUTPUT_FIELDS, REFERENCES
from iapo.verl_adapter.estimator import bind
from iapo.verl_adapter.old_log_probs import needs_old_log_probs
from iapo.verl_adapter.replay_buffer import IapoReplayBuffer
from iapo.verl_adapter.reward_manager import eos_token_ids
from iapo.verl_adapter.rows import correctness, fetch, jagged, joined, order_rows, pad_with_last, put, reward_infos
from iapo.verl_adapter.worker import IapoWorker

# What verl's log-probs and its loss read, and the pass. verl leaves out those that aren't there.
LOG_PROB_FIELDS = ["prompts", "responses", "response_mask", "loss_mask", "input_ids", "position_ids"]
UPDATE_FIELDS = [
    *LOG_PROB_FIELDS,
    *("advantages", "old_log_probs", "ref_log_prob", "rollout_log_probs", "rollout_is_weights"),
]

# Batches of prompts that dynamic sampling may draw for one step before the run is stopped.
MAX_REFILLS = 100


@register_trainer("iapo")
class IapoTrainer(PPOTrainerSync):
    """What is added to verl's trainer, in the order in which verl calls it:

    - once: `_init_resource_pool_mgr`, `_build_replay_buffer`, `_load_checkpoint`, `fit`;
    - in a validation: `_validate`;
    - for every batch, of training or validation: `on_validate_begin` or `on_sample_begin`, then `on_batch`;
    - in a step: `_compute_old_log_prob`, `_compute_ref_log_prob`, `_compute_advantage`, `_update_actor`,
      `_save_checkpoint` where one is due, `_compute_metrics`.

    Stages pass data on in TransferQueue. The one exception is `_result`: `_compute_advantage` sets it, and
    `_update_actor` reads its loss mask.
    """

    def __init__(self, config):
        # verl compares the mode with "sync" as a string in its replay buffer and checkpoints; any other name would
        # silently select the asynchronous behaviour.
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"
        self.config = config
        self.iapo = IapoConfig.from_mapping(OmegaConf.to_container(config.iapo, resolve=True))
        self.methods = make_methods(OmegaConf.to_container(config.methods, resolve=True))
        self._result: StepAdvantage | None = None  # of the current step, from its advantage to its update
        self.refilled = 0  # prompts that dynamic sampling drew for the current step
        self.validation_failures = 0  # completions that the current validation lacks
        self._validation_began = self._validation_seconds = 0.0  # when the last one began and how long it took
        self.resumed_step = 0  # last step of the checkpoint that this run resumes from; 0: it begins
        super().__init__(config)

    # -- wiring -------------------------------------------------------------------------------------------------

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        for role in list(self.role_worker_mapping):
            if self.mapping[role] == "global_pool" and "Actor" in role.name:
                self.role_worker_mapping[role] = ray.remote(IapoWorker)

    def _build_replay_buffer(self) -> IapoReplayBuffer:
        poll_interval = self.config.trainer.v1.sampler.sampler_kwargs.get("poll_interval")
        return IapoReplayBuffer(super()._build_replay_buffer(), self.on_batch, poll_interval)

    def on_sample_begin(self):
        super().on_sample_begin()
        self.refilled = 0

    def _add_prompts_to_generate(self, num_prompts: int) -> int:
        """verl's refill of groups that dynamic sampling dropped; it would never end if none is ever mixed."""
        self.refilled += num_prompts
        limit = MAX_REFILLS * self.config.data.train_batch_size
        if self.refilled > limit:
            raise RuntimeError(
                f"algorithm.filter_groups: {limit} extra prompts of step {self.global_steps} gave too few groups with "
                "different values of the metric, so there is nothing to learn from; use other data or enable=false."
            )
        return super()._add_prompts_to_generate(num_prompts)

    def fit(self, agent_loop_manager):
        run_dir = Path(self.config.run_dir)
        validated = [v.step for v in validations(run_dir)] if (run_dir / "metrics.jsonl").is_file() else []
        if self.resumed_step > 0 and self.resumed_step in validated and not self.config.trainer.val_only:
            self.config.trainer.val_before_train = False  # it was done before the stop
        super().fit(agent_loop_manager)

    def on_validate_begin(self):
        super().on_validate_begin()
        self._attach_loggers()
        size = f"{len(self.val_dataset)} prompts x {self.config.actor_rollout_ref.rollout.val_kwargs.n}"
        limit = f"data.val_max_samples={self.config.data.val_max_samples}"
        expected = f", about {clock(self._validation_seconds)}" if self._validation_seconds else ""
        print(f"iapo: validation: {size} ({limit}){expected}", flush=True)
        self._validation_began = time.monotonic()

    def _validate(self) -> dict[str, float]:
        """verl's, with the number of completions that are missing: its accuracy counts them as wrong."""
        self.validation_failures = 0
        return super()._validate() | {"iapo/validation_rollout_failures": self.validation_failures}

    def on_validate_end(self):
        super().on_validate_end()
        self._validation_seconds = time.monotonic() - self._validation_began

    def on_train_begin(self):
        super().on_train_begin()
        self._attach_loggers()

    def _attach_loggers(self) -> None:
        """Before anything is logged: verl's own file logger truncates its file, so a resumed run would lose its
        history, and its console logger prints a hundred numbers a step."""
        if isinstance(self.logger.logger.get("file"), MetricsFile):
            return
        self.logger.logger["file"] = MetricsFile(Path(self.config.run_dir) / "metrics.jsonl", self.resumed_step)
        if "console" in self.logger.logger:
            self.logger.logger["console"] = ProgressConsole(
                self.total_training_steps, self.iapo.score, self.iapo.format
            )

    # -- the step -----------------------------------------------------------------------------------------------

    @property
    def shares_forward(self) -> bool:
        """Whether the exit entropies come with old log-probs; in bypass mode verl computes none."""
        bypass = OmegaConf.select(self.config, "algorithm.rollout_correction.bypass_mode")
        return self.iapo.share_log_prob_forward and self.iapo.needs_exit_entropy and not bypass

    def on_batch(self, batch: KVBatchMeta, metrics: dict, prompts: int) -> None:
        """Every sampled batch, for training or validation, in order and checked."""
        training = batch.partition_id == "train"
        probes = self.iapo.needs_exit_entropy if training else self.iapo.validation_information
        scores_references = probes and self.iapo.needs_references
        data = fetch(batch, ["index", "extra_fields", *(["reward_model"] if scores_references else [])])
        infos = reward_infos(data)
        errors = [info["reward_error"] for info in infos if info.get("reward_error")]
        if errors:
            raise RuntimeError(
                f"reward: the reward function raised on {len(errors)} of {len(batch)} completions of step "
                f"{self.global_steps}, first: {errors[0]}. Fix the function; its traceback is in the log above."
            )
        rollout = self.config.actor_rollout_ref.rollout
        if training:
            metrics["iapo/rollout_failures"] = prompts * rollout.n - len(batch)
        else:  # verl drops these metrics
            self.validation_failures += prompts * rollout.val_kwargs.n - len(batch)
        order = order_rows(batch, data["index"])
        if scores_references:
            put(batch, **{REFERENCES: jagged([self.reference_ids(data["reward_model"][i]) for i in order])})
        if not training and self.iapo.validation_information:
            self._record_validation_information(batch, [data["extra_fields"][i] for i in order])

    def reference_ids(self, reward_model) -> torch.Tensor:
        """The tokens of a row's right answers, each with what ends it."""
        texts = references(getattr(reward_model, "data", reward_model)["ground_truth"])
        return joined([answer_ids(self.tokenizer, text + self.iapo.answer_end) for text in texts])

    @cached_property
    def skips_old_log_prob(self) -> bool:
        """Whether the update's own log-probs can stand in for old ones: see `needs_old_log_probs`."""
        return not needs_old_log_probs(self.config)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if self.skips_old_log_prob:
            return batch
        if self.shares_forward:
            batch.extra_info["iapo"] = asdict(self.iapo.in_training)
        more = [REFERENCES] if self.shares_forward and self.iapo.needs_references else []
        with self.reads(batch, LOG_PROB_FIELDS + more):
            result = super()._compute_old_log_prob(batch, metrics)
        result.extra_info.pop("iapo", None)  # reference log-probs may be computed by the same worker
        return result

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        with self.reads(batch, LOG_PROB_FIELDS):
            return super()._compute_ref_log_prob(batch, metrics)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if any(key.rsplit("_", 1)[-1] != "0" for key in batch.keys):
            raise ValueError(
                "actor_rollout_ref.rollout.agent: this agent loop returns several outputs per rollout, whose "
                "token-level advantages are not defined; use single_turn_agent."
            )
        if self.config.algorithm.adv_estimator != "iapo":
            return super()._compute_advantage(batch, metrics)
        if self.iapo.needs_exit_entropy and not self.shares_forward:
            with marked_timer("exit_entropy", self.timing_raw, color="purple"):
                self._run_exit_entropy(batch, self.iapo.in_training)
        data = fetch(batch, self.advantage_fields)
        if "exit_entropy_seconds" in data:
            seconds = data["exit_entropy_seconds"].max().item()
            self.timing_raw["exit_entropy"] = self.timing_raw.get("exit_entropy", 0.0) + seconds
        inputs = self.step_inputs(data)
        with bind(inputs) as carrier:
            batch = super()._compute_advantage(batch, metrics)
        self._result = carrier.result
        response_mask = data["response_mask"].to_padded_tensor(0)
        probe_tokens = int(data["probe_tokens"].values().sum()) if "probe_tokens" in data else 0
        seconds = self.timing_raw.get("exit_entropy", 0.0)
        metrics.update(information_metrics(inputs, self._result, response_mask, probe_tokens, seconds))
        metrics.update(method_metrics(self.methods, self._result, response_mask))
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's, with the loss over the tokens that the methods leave; its metrics still count all of them."""
        with self._narrow_loss(batch), self.reads(batch, UPDATE_FIELDS):
            batch = super()._update_actor(batch, metrics)
        if self.skips_old_log_prob and "actor/entropy_loss" in metrics:
            metrics["actor/entropy"] = metrics["actor/entropy_loss"]
        return batch

    @contextmanager
    def _narrow_loss(self, batch: KVBatchMeta) -> Iterator[None]:
        """Let the masks in TransferQueue be those of the methods, where a method has one; then verl's again."""
        if not any("loss_mask" in acts_by(method) for method in self.methods.values()):
            yield
            return
        before = fetch(batch, ["response_mask", "loss_mask"])
        rows = zip(self._result.loss_mask, before["response_mask"].unbind(), strict=True)
        mask = jagged([new[: len(old)].to(old.dtype) for new, old in rows])
        put(batch, response_mask=mask, loss_mask=mask)
        try:
            yield
        finally:
            put(batch, **before)

    @contextmanager
    def reads(self, batch: KVBatchMeta, fields: list[str]) -> Iterator[None]:
        """Let the workers fetch these fields only: the others, texts and dictionaries, cost more than the tensors.

        Everything is fetched where more is read: of inputs other than text, of routes to replay, of teachers.
        """
        replays = self.config.actor_rollout_ref.rollout.enable_rollout_routing_replay
        if self.processor is None and not replays and not self.use_teacher_policy:
            batch.fields = fields
        try:
            yield
        finally:
            batch.fields = None

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self):
        # Before verl's, which ends by naming this checkpoint the last.
        folder = step_folder(self.config.trainer.default_local_dir, self.global_steps)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data.pt").unlink(missing_ok=True)  # of a broken step: until verl writes it, the new one isn't whole
        save_states(self.methods, folder)
        super()._save_checkpoint()
        if keep := self.config.trainer.max_actor_ckpt_to_keep:  # verl counts those that its process wrote
            contents = self.config.actor_rollout_ref.actor.checkpoint.save_contents
            source = Path(self.config.trainer.resume_from_path or "").name.removeprefix("global_step_")
            spare = [int(source)] if source.isdecimal() else []
            remove_surplus(folder.parent, self.global_steps, keep, contents, local_ranks(self.config), spare)

    def _load_checkpoint(self):
        self._choose_checkpoint()
        result = super()._load_checkpoint()
        self.resumed_step = self.global_steps
        if self.global_steps and self.methods:
            mode = self.config.trainer.resume_mode
            folder = step_folder(self.config.trainer.default_local_dir, self.global_steps)
            folder = Path(self.config.trainer.resume_from_path) if mode == "resume_path" else folder
            load_states(self.methods, folder)
        return result

    def _choose_checkpoint(self) -> None:
        """Resume from the newest whole checkpoint, where verl takes the one that its tracker names."""
        found = resume_point(self.config)
        if found is not None and found.problems and found.step is not None:
            trainer = self.config.trainer
            folder = step_folder(trainer.default_local_dir, found.step)
            trainer.resume_mode, trainer.resume_from_path = "resume_path", str(folder)

    def _compute_metrics(self, batch: KVBatchMeta, metrics, timing_raw, global_steps, epoch):
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        real = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
        rows = KVBatchMeta(keys=real, tags=[{}] * len(real), partition_id=batch.partition_id)
        metrics.update(reward_metrics(reward_infos(fetch(rows, ["extra_fields"]))))

    # -- data ---------------------------------------------------------------------------------------------------

    def _run_exit_entropy(self, batch: KVBatchMeta, config: IapoConfig) -> None:
        """Let the workers write `OUTPUT_FIELDS` for the rows of `batch`."""
        request = KVBatchMeta(
            partition_id=batch.partition_id,
            keys=batch.keys,
            tags=batch.tags,
            fields=INPUT_FIELDS + ([REFERENCES] if self.iapo.needs_references else []),
            extra_info={"iapo": asdict(config)},
        )
        self.actor_rollout_wg.compute_exit_entropy(request)

    @cached_property
    def advantage_fields(self) -> list[str]:
        """What the advantage stage reads from TransferQueue, besides what verl's own part of it does."""
        needs = {name for method in self.methods.values() for name in method.needs}
        fields = {"response_mask"}
        if self.iapo.needs_exit_entropy:
            fields |= {*OUTPUT_FIELDS, *(["exit_entropy_seconds"] if self.shares_forward else [])}
        if self.iapo.needs_next_token_entropy:
            fields |= {"responses", "entropy"}
        if self.iapo.beta > 0:
            fields.add("old_log_probs")
        fields |= {field for name, field in (("tokens", "responses"), ("entropy", "entropy")) if name in needs}
        if self.iapo.needs_correctness or "correct" in needs:
            fields.add("extra_fields")
        return sorted(fields)

    def step_inputs(self, data: TensorDict) -> StepInputs:
        """From the fields that were fetched, which are those that something needs."""
        fields: dict[str, torch.Tensor] = {}
        if "exit_entropy" in data:
            fields["exit_entropy"] = pad_with_last(data["exit_entropy"])
            fields["region_mask"] = data["region_mask"].to_padded_tensor(0)
        elif self.iapo.needs_next_token_entropy:
            fields["exit_entropy"], fields["region_mask"] = self._next_token_entropies(data)
        for name, field in (("tokens", "responses"), ("entropy", "entropy"), ("old_log_probs", "old_log_probs")):
            if field in data:
                fields[name] = data[field].to_padded_tensor(0)
        if "extra_fields" in data:
            fields["correct"] = correctness(reward_infos(data))
        return StepInputs(self.iapo, self.methods, self.global_steps, **fields)

    def _next_token_entropies(self, data: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T + 1) entropies of verl's old log-probs and (B, T) region, in place of the probe pass's."""
        rows = zip(data["responses"].unbind(), data["response_mask"].unbind(), strict=True)
        lengths = [region_length(ids, mask, self.iapo, self.tokenizer, self._end_tokens) for ids, mask in rows]
        mask_BT = data["response_mask"].to_padded_tensor(0)
        region_BT = torch.arange(mask_BT.shape[1]) < torch.tensor(lengths)[:, None]
        return next_token_entropies(data["entropy"].to_padded_tensor(0), mask_BT), region_BT.long()

    @cached_property
    def _end_tokens(self) -> set[int]:
        return set(eos_token_ids(self.config, self.tokenizer))

    def _record_validation_information(self, batch: KVBatchMeta, extra_fields: list) -> None:
        """Add the information rate to the reward infos of validation completions, which verl averages per source."""
        ranks = self.actor_rollout_wg.world_size
        if len(batch) < ranks:  # they can't be shared out
            print(f"iapo: validation: {len(batch)} completions for {ranks} ranks: no information rate", flush=True)
            return
        self._run_exit_entropy(batch, self.iapo)
        recorded = []
        for h, extra in zip(fetch(batch, ["exit_entropy"])["exit_entropy"].unbind(), extra_fields, strict=True):
            extra = dict(getattr(extra, "data", extra))
            tokens = torch.ones(1, len(h) - 1)
            rate = information_rate(h[None], tokens).item()
            extra["reward_extra_info"] = extra["reward_extra_info"] | {"information_rate": rate}
            recorded.append(NonTensorData(extra))
        put(batch, extra_fields=NonTensorStack(*recorded))
