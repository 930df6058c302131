"""The trainer: verl's synchronous v1 trainer with the exit-entropy pass between old log-probs and the advantage.

With `iapo.share_log_prob_forward` the pass goes with the old log-probs.
"""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.utils.debug import marked_timer

from iapo.config import IapoConfig
from iapo.information import next_token_entropies
from iapo.methods import load_states, make_methods, save_states
from iapo.metrics.console import ProgressConsole
from iapo.metrics.file import MetricsFile
from iapo.metrics.training import information_metrics, method_metrics, reward_metrics
from iapo.verl_adapter.estimator import AdvantageInputs, bind
from iapo.verl_adapter.reward_manager import eos_token_ids
from iapo.verl_adapter.worker import INPUT_FIELDS, OUTPUT_FIELDS, IapoWorker, region_length

# Batches of prompts that dynamic sampling may draw for one step before the run is stopped.
MAX_REFILLS = 100

# What verl's replay buffer says when every rollout of a training step failed.
NO_COMPLETION = "Sync replay buffer selected terminal groups with no materializable trajectories."


@register_trainer("iapo")
class IapoTrainer(PPOTrainerSync):
    def __init__(self, config):
        # verl compares the mode with "sync" as a string in its replay buffer and checkpoints; any other name would
        # silently select the asynchronous behaviour.
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"
        self.iapo = IapoConfig.from_mapping(OmegaConf.to_container(config.iapo, resolve=True))
        self.methods = make_methods(OmegaConf.to_container(config.methods, resolve=True))
        self._loss_mask: torch.Tensor | None = None  # of the step at hand, (B, T); None: the response mask
        self._refilled = 0  # prompts that dynamic sampling drew for the step at hand
        super().__init__(config)

    # -- wiring -------------------------------------------------------------------------------------------------

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        for role in list(self.role_worker_mapping):
            if self.mapping[role] == "global_pool" and "Actor" in role.name:
                self.role_worker_mapping[role] = ray.remote(IapoWorker)

    def _build_replay_buffer(self):
        """verl's buffer, with every sampled batch checked, and measured if it is a validation batch."""
        buffer = super()._build_replay_buffer()
        sampler_kwargs = self.config.trainer.v1.sampler.sampler_kwargs
        buffer.poll_interval = sampler_kwargs.get("poll_interval", buffer.poll_interval)
        sample = buffer.sample

        def checked_sample(*, global_steps, partition_id, batch_size):
            self._refilled = 0
            try:
                batch, metrics = sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
            except RuntimeError as error:
                if NO_COMPLETION not in str(error):
                    raise
                raise self._no_completion(batch_size) from error
            self._check_rollouts(batch, metrics, batch_size)
            self._order_rows(batch)
            if partition_id == "val" and self.iapo.validation_information:
                self._record_validation_information(batch)
            return batch, metrics

        buffer.sample = checked_sample
        return buffer

    def _add_prompts_to_generate(self, num_prompts: int) -> int:
        """verl's refill of groups that dynamic sampling dropped; it would go on for ever if none is ever mixed."""
        self._refilled += num_prompts
        limit = MAX_REFILLS * self.config.data.train_batch_size
        if self._refilled > limit:
            raise RuntimeError(
                f"algorithm.filter_groups: {limit} extra prompts of step {self.global_steps} gave too few groups with "
                "different values of the metric, so there is nothing to learn from; use other data or enable=false."
            )
        return super()._add_prompts_to_generate(num_prompts)

    @property
    def logger(self):
        return self._logger

    @logger.setter
    def logger(self, tracking):
        # verl's own file logger truncates its file, so a resumed run would lose its history; its console logger prints
        # a hundred numbers a step.
        tracking.logger["file"] = MetricsFile(Path(self.config.run_dir) / "metrics.jsonl", self.global_steps)
        if "console" in tracking.logger:
            tracking.logger["console"] = ProgressConsole(self.total_training_steps)
        self._logger = tracking

    # -- the step -----------------------------------------------------------------------------------------------

    @property
    def _shares_forward(self) -> bool:
        """Whether the exit entropies come with old log-probs; in bypass mode verl computes none."""
        bypass = OmegaConf.select(self.config, "algorithm.rollout_correction.bypass_mode")
        return self.iapo.share_log_prob_forward and self.iapo.needs_exit_entropy and not bypass

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if not self._shares_forward:
            return super()._compute_old_log_prob(batch, metrics)
        batch.extra_info["iapo"] = asdict(self.iapo)
        result = super()._compute_old_log_prob(batch, metrics)
        result.extra_info.pop("iapo", None)  # reference log-probs may be computed by the same worker
        seconds = self._fetch(result, ["exit_entropy_seconds"])["exit_entropy_seconds"].max().item()
        self.timing_raw["exit_entropy"] = self.timing_raw.get("exit_entropy", 0.0) + seconds
        return result

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if any(key.rsplit("_", 1)[-1] != "0" for key in batch.keys):
            raise ValueError(
                "actor_rollout_ref.rollout.agent: this agent loop returns several outputs per rollout, whose "
                "token-level advantages are not defined; use single_turn_agent."
            )
        if self.config.algorithm.adv_estimator != "iapo":
            return super()._compute_advantage(batch, metrics)
        if self.iapo.needs_exit_entropy and not self._shares_forward:
            with marked_timer("exit_entropy", self.timing_raw, color="purple"):
                self._run_exit_entropy(batch)
        with bind(self._advantage_inputs(batch)) as inputs:
            batch = super()._compute_advantage(batch, metrics)
        response_mask = self._fetch(batch, ["response_mask"])["response_mask"].to_padded_tensor(0)
        metrics.update(information_metrics(inputs, response_mask, self.timing_raw.get("exit_entropy")))
        metrics.update(method_metrics(self.methods, inputs, response_mask))
        self._loss_mask = None if torch.equal(inputs.loss_mask, response_mask) else inputs.loss_mask
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """verl's, with the loss over the tokens that the methods leave; its metrics still count all of them."""
        if self._loss_mask is None:
            return super()._update_actor(batch, metrics)
        before = self._fetch(batch, ["response_mask", "loss_mask"])
        rows = zip(self._loss_mask, before["response_mask"].unbind(), strict=True)
        mask = torch.nested.as_nested_tensor([new[: len(old)].to(old.dtype) for new, old in rows], layout=torch.jagged)
        self._put(batch, response_mask=mask, loss_mask=mask)
        batch = super()._update_actor(batch, metrics)
        self._put(batch, **before)
        return batch

    # -- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self):
        # Before verl's, which ends by naming this checkpoint the last.
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        save_states(self.methods, folder)
        super()._save_checkpoint()

    def _load_checkpoint(self):
        result = super()._load_checkpoint()
        if self.global_steps and self.methods:
            mode = self.config.trainer.resume_mode
            folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
            folder = Path(self.config.trainer.resume_from_path) if mode == "resume_path" else folder
            load_states(self.methods, folder)
        return result

    def _compute_metrics(self, batch: KVBatchMeta, metrics, timing_raw, global_steps, epoch):
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        real = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
        metrics.update(reward_metrics(self._reward_infos(real, batch.partition_id)))

    # -- data ---------------------------------------------------------------------------------------------------

    def _run_exit_entropy(self, batch: KVBatchMeta) -> None:
        """Let the workers write `OUTPUT_FIELDS` for the rows of `batch`."""
        request = KVBatchMeta(
            partition_id=batch.partition_id,
            keys=batch.keys,
            tags=batch.tags,
            fields=INPUT_FIELDS,
            extra_info={"iapo": asdict(self.iapo)},
        )
        self.actor_rollout_wg.compute_exit_entropy(request)

    def _advantage_inputs(self, batch: KVBatchMeta) -> AdvantageInputs:
        inputs = AdvantageInputs(self.iapo, self.methods, self.global_steps)
        needs = {name for method in self.methods.values() for name in method.needs}
        if self.iapo.needs_exit_entropy:
            data = self._fetch(batch, OUTPUT_FIELDS)
            inputs.exit_entropy = pad_with_last(data["exit_entropy"])
            inputs.region_mask = data["region_mask"].to_padded_tensor(0)
            inputs.probe_tokens = int(data["probe_tokens"].sum())
        if self.iapo.needs_next_token_entropy:
            inputs.exit_entropy, inputs.region_mask = self._next_token_entropies(batch)
        if self.iapo.beta > 0:
            inputs.old_log_probs = self._fetch(batch, ["old_log_probs"])["old_log_probs"].to_padded_tensor(0.0)
        for name, field in (("tokens", "responses"), ("entropy", "entropy")):
            if name in needs:
                setattr(inputs, name, self._fetch(batch, [field])[field].to_padded_tensor(0))
        infos = self._reward_infos(batch.keys, batch.partition_id) if needs or self.iapo.needs_correctness else []
        if self.iapo.needs_correctness or "correct" in needs:
            if any("acc" not in info for info in infos):
                raise ValueError(
                    "reward: the reward function returns no 'acc' (1 if the answer is right, else 0), which iapo.beta, "
                    "iapo.rho, iapo.gate=correct and most methods need; return it or set them to 0, 0, 'all' and none."
                )
            inputs.correct = torch.tensor([float(info["acc"]) for info in infos]) > 0.5
        return inputs

    def _next_token_entropies(self, batch: KVBatchMeta) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T + 1) entropies of verl's old log-probs and (B, T) region, in place of the probe pass's."""
        data = self._fetch(batch, ["responses", "response_mask", "entropy"])
        rows = zip(data["responses"].unbind(), data["response_mask"].unbind(), strict=True)
        lengths = [region_length(ids, mask, self.iapo, self.tokenizer, self._end_tokens) for ids, mask in rows]
        mask_BT = data["response_mask"].to_padded_tensor(0)
        region_BT = torch.arange(mask_BT.shape[1]) < torch.tensor(lengths)[:, None]
        return next_token_entropies(data["entropy"].to_padded_tensor(0), mask_BT), region_BT.long()

    @cached_property
    def _end_tokens(self) -> set[int]:
        return set(eos_token_ids(self.config, self.tokenizer))

    def _record_validation_information(self, batch: KVBatchMeta) -> None:
        """Add the information rate to the reward infos of validation completions, which verl averages per source."""
        if len(batch) < self.actor_rollout_wg.world_size:
            return  # fewer completions than ranks can't be shared out; verl averages over the other batches
        self._run_exit_entropy(batch)
        data = self._fetch(batch, ["exit_entropy", "extra_fields"])
        extra_fields = []
        for h, extra in zip(data["exit_entropy"].unbind(), data["extra_fields"], strict=True):
            extra = dict(getattr(extra, "data", extra))
            rate = (h[0] - h[-1]).item() / max(len(h) - 1, 1)
            extra["reward_extra_info"] = extra["reward_extra_info"] | {"information_rate": rate}
            extra_fields.append(NonTensorData(extra))
        self._put(batch, extra_fields=NonTensorStack(*extra_fields))

    def _check_rollouts(self, batch: KVBatchMeta, metrics: dict, prompts: int) -> None:
        """Stop with one clear line where verl would go on with missing rollouts or hide a raising reward."""
        if len(batch) == 0:
            raise self._no_completion(prompts)
        errors = [
            info["reward_error"]
            for info in self._reward_infos(batch.keys, batch.partition_id)
            if info.get("reward_error")
        ]
        if errors:
            raise RuntimeError(
                f"reward: the reward function raised on {len(errors)} of {len(batch)} completions of step "
                f"{self.global_steps}, first: {errors[0]}. Fix the function; its traceback is in the log above."
            )
        if batch.partition_id == "train":
            expected = prompts * self.config.actor_rollout_ref.rollout.n
            metrics["iapo/rollout_failures"] = expected - len(batch)

    def _no_completion(self, prompts: int) -> RuntimeError:
        return RuntimeError(
            f"rollout: none of the {prompts} prompts of step {self.global_steps} gave a completion; the first error is "
            "in the log above, from AgentLoopWorkerTQ."
        )

    def _order_rows(self, batch: KVBatchMeta) -> None:
        """By prompt and rollout number: the buffer's own order is that of random ids, which would change rounding."""
        index = [str(getattr(i, "data", i)) for i in self._fetch(batch, ["index"])["index"]]
        batch.reorder(sorted(range(len(batch)), key=lambda i: (index[i], int(batch.keys[i].split("_")[1]))))

    def _reward_infos(self, keys: list[str], partition_id: str) -> list[dict]:
        data = self._fetch(KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id=partition_id), ["extra_fields"])
        return [getattr(extra, "data", extra).get("reward_extra_info", {}) for extra in data["extra_fields"]]

    @staticmethod
    def _fetch(batch: KVBatchMeta, fields: list[str]) -> TensorDict:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        missing = [name for name in fields if name not in data]
        if missing:  # TransferQueue drops unknown fields in silence
            raise RuntimeError(f"TransferQueue holds no {', '.join(missing)} for partition {batch.partition_id!r}.")
        return data

    @staticmethod
    def _put(batch: KVBatchMeta, **fields) -> None:
        data = TensorDict(fields, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=data)


def pad_with_last(nested: torch.Tensor) -> torch.Tensor:
    """(B, max length) from a jagged tensor; a row goes on with its last value."""
    rows = nested.unbind()
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row[-1].expand(width - len(row))]) for row in rows])
