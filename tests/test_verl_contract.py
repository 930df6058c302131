"""What this package takes for granted about verl. A failure here names what moved; see iapo/verl_adapter."""

import importlib
import inspect
import math
import re
from importlib import metadata
from pathlib import Path

import pytest

TESTED = "0.9.1"


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_version():
    version = metadata.version("verl")
    assert version == TESTED, f"verl {version} is installed, this code was written for {TESTED}: go through this file"


# By module of `iapo.verl_adapter` and class: the methods of verl that it replaces.
OVERRIDES = {
    "agent_loop.SeededSingleTurnAgentLoop": ["run"],
    "dataset.NumberedDataset": ["__getitem__", "maybe_filter_out_long_prompts"],
    "engine.IapoEngine": ["forward_step"],
    "group_rollouts.GroupClient": ["__init__", "_acquire_server", "_release_server"],
    "group_rollouts.GroupRolloutManager": ["__init__"],
    "group_rollouts.GroupRolloutWorker": ["_run_prompt"],
    "replay_buffer.IapoReplayBuffer": ["__init__", "_sampleable_terminal_keys", "sample"],
    "reward_manager.IapoRewardManager": ["__init__", "run_single"],
    "runner.IapoTaskRunner": ["run"],
    "trainer.IapoTrainer": [
        "__init__",
        "_add_prompts_to_generate",
        "_build_replay_buffer",
        "_compute_advantage",
        "_compute_metrics",
        "_compute_old_log_prob",
        "_compute_ref_log_prob",
        "_init_resource_pool_mgr",
        "_load_checkpoint",
        "_save_checkpoint",
        "_update_actor",
        "_validate",
        "fit",
        "on_sample_begin",
        "on_train_begin",
        "on_validate_begin",
        "on_validate_end",
    ],
    "worker.IapoWorker": ["compute_log_prob", "init_model"],
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_the_methods_of_verl_that_are_replaced(name):
    """verl still has each, with the parameters that ours takes, and no other one is replaced by accident."""
    module, _, class_name = name.partition(".")
    ours = getattr(importlib.import_module(f"iapo.verl_adapter.{module}"), class_name)
    ours = getattr(getattr(ours, "__ray_metadata__", None), "modified_class", ours)
    verls = ours.__mro__[1]
    replaced = [name for name, value in vars(ours).items() if callable(value) and hasattr(verls, name)]
    assert sorted(replaced) == OVERRIDES[name]
    for method in set(replaced) - {"__init__"}:
        given, expected = (
            [name for name in parameters(inspect.unwrap(getattr(cls, method))) if name != "_ray_trace_ctx"]  # Ray's own
            for cls in (ours, verls)
        )
        if given != expected:  # then ours passes on what it doesn't name
            assert given[-1] in ("args", "kwargs") and given[:-1] == expected[: len(given) - 1], (method, expected)


def test_what_the_worker_and_the_rollouts_call():
    from verl.experimental.agent_loop import agent_loop
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
    from verl.workers.engine_workers import TrainingWorker

    assert parameters(TrainingWorker.set_loss_fn)[:2] == ["self", "loss_fn"]
    assert "single_turn_agent" in agent_loop._agent_loop_registry
    source = inspect.getsource(ReplayBuffer.__init__)
    for name in parameters(ReplayBuffer.__init__)[1:]:  # `IapoReplayBuffer` reads each under its name
        assert f"self.{name} = " in source, name


def test_trainer_attributes_that_are_read():
    from verl.trainer.ppo.v1 import trainer_base

    source = inspect.getsource(trainer_base.PPOTrainer)
    for name in (
        "self.role_worker_mapping = {}",
        'self.mapping[role] = "global_pool"',
        "self.timing_raw = {}",
        "self.logger = Tracking(",
        "self.total_training_steps",
        "self.tokenizer",
        "self.global_steps",
        "self.replay_buffer = self._build_replay_buffer()",
    ):
        assert name in source, f"PPOTrainer no longer has {name!r}"


def test_trainer_mode_is_compared_as_a_string():
    """Why IapoTrainer sets the mode back to "sync"; if this fails, that line can go."""
    from verl.trainer.ppo.v1 import trainer_base

    assert 'self.trainer_mode == "sync"' in inspect.getsource(trainer_base)


def test_replay_buffer_sample():
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    assert parameters(inspect.unwrap(ReplayBuffer.sample)) == ["self", "global_steps", "partition_id", "batch_size"]
    assert "poll_interval" in parameters(ReplayBuffer.__init__)


def test_a_step_without_any_completion_raises_what_the_trainer_looks_for():
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    from iapo.verl_adapter.replay_buffer import NO_COMPLETION

    assert NO_COMPLETION in inspect.getsource(inspect.unwrap(ReplayBuffer.sample))


def test_task_runner_can_be_subclassed():
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

    runner = TaskRunnerV1.__ray_metadata__.modified_class
    assert parameters(runner.run)[:2] == ["self", "config"]
    assert "get_trainer_cls(config.trainer.v1.trainer_mode)" in inspect.getsource(runner.run)
    assert parameters(run_ppo) == ["config", "task_runner_class"]


def test_estimator_is_called_with_rewards_mask_config_and_index():
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
    from verl.trainer.ppo.ray_trainer import compute_advantage

    source = inspect.getsource(compute_advantage)
    for key in ('"token_level_rewards"', '"response_mask"', '"config": config', 'adv_kwargs["index"]'):
        assert key in source, f"compute_advantage no longer passes {key}"
    assert parameters(compute_grpo_outcome_advantage)[:3] == ["token_level_rewards", "response_mask", "index"]
    assert "norm_adv_by_std_in_grpo" in parameters(compute_grpo_outcome_advantage)


def test_worker_and_engine():
    from verl.workers import engine_workers
    from verl.workers.engine.fsdp import transformer_impl

    source = inspect.getsource(engine_workers)
    assert "self.actor = self.actor_worker_cls(" in source and "self.engine: BaseEngine" in source
    engine = transformer_impl.FSDPEngine
    for name in ("eval_mode", "get_data_parallel_group"):
        assert hasattr(engine, name), f"FSDPEngine.{name} is gone"
    assert "self._autocast_dtype" in inspect.getsource(transformer_impl)
    assert parameters(engine_workers.ActorRolloutRefWorker.compute_log_prob) == ["self", "data"]
    assert "self.forward_step(micro_batch, " in inspect.getsource(engine.forward_backward_batch)


def test_transfer_queue_batch():
    from transfer_queue import KVBatchMeta

    assert parameters(KVBatchMeta)[:5] == ["keys", "tags", "partition_id", "fields", "extra_info"]


def test_tracking_calls_backends_with_data_and_step():
    from verl.utils.tracking import Tracking

    assert "logger_instance.log(data=data, step=step)" in inspect.getsource(Tracking.log)


def test_reward_manager():
    from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager

    from iapo.launch.check_files import REWARD_ARGUMENTS

    assert parameters(DAPORewardManager.run_single) == ["self", "data"]
    call = " ".join(inspect.getsource(DAPORewardManager.run_single).partition("await self.compute_score(")[2].split())
    assert re.findall(r"(\w+)=", call.partition("**extra_reward_kwargs")[0]) == list(REWARD_ARGUMENTS)


def test_validation_averages_numeric_reward_infos():
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    infos = {"acc": [1.0, 0.0], "information_rate": [0.02, 0.04], "pred": ["1", "2"]}
    result = process_validation_metrics(["gsm8k", "gsm8k"], ["a", "b"], infos)["gsm8k"]
    assert result["acc"]["mean@1"] == 0.5
    assert result["information_rate"]["mean@1"] == pytest.approx(0.03)


def test_places_of_the_cpu_workarounds():
    import verl.utils.distributed as distributed
    from torch.distributed.fsdp import CPUOffloadPolicy
    from verl.plugin.platform import PlatformRegistry

    assert "backend" in parameters(distributed.initialize_global_process_group_ray)
    assert parameters(CPUOffloadPolicy.__init__)[:2] == ["self", "pin_memory"]
    assert callable(PlatformRegistry.register)


def test_the_socket_for_weights_is_named_by_the_job():
    """What `unique_job_id` changes on both sides."""
    import verl

    from iapo.verl_adapter.vllm_plugin import JOB_ID

    folder = Path(verl.__file__).parent / "workers/rollout/vllm_rollout"
    server, trainer, worker = (
        (folder / f"{name}.py").read_text() for name in ("vllm_async_server", "vllm_rollout", "utils")
    )
    name = 'f"ipc:///tmp/rl-colocate-zmq-{job_id}-'
    assert f'os.environ["{JOB_ID}"] = ray.get_runtime_context().get_job_id()' in server
    assert "job_id = ray.get_runtime_context().get_job_id()" in trainer and f"self.zmq_handle = {name}" in trainer
    assert f'job_id = os.environ.get("{JOB_ID}", "0")' in worker and f"return {name}" in worker


def test_a_mini_batch_without_a_token_has_a_loss_of_0_and_the_gradient_of_verls_nan():
    import torch
    from tensordict import TensorDict
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils import tensordict_utils as tu

    from iapo.verl_adapter.engine import divide_by_a_token

    def loss_of(tokens, mask):
        losses = torch.ones(2, 3, requires_grad=True)
        loss = agg_loss(losses, mask, "token-mean", batch_num_tokens=tokens)
        loss.backward()
        return loss.item(), losses.grad

    def divided(tokens):
        micro_batch = TensorDict({}, batch_size=[])
        tu.assign_non_tensor(micro_batch, batch_num_tokens=tokens)
        divide_by_a_token(micro_batch)
        return tu.get_non_tensor_data(micro_batch, "batch_num_tokens", None)

    nothing = torch.zeros(2, 3)
    (nan, gradient), (loss, same) = loss_of(0, nothing), loss_of(divided(0), nothing)
    assert math.isnan(nan) and loss == 0  # when verl's is a number too, `divide_by_a_token` can go
    assert torch.equal(gradient, same) and not same.any()
    assert divided(5) == 5
    divide_by_a_token(without := TensorDict({}, batch_size=[]))  # a forward without a loss
    assert list(without.keys()) == []
