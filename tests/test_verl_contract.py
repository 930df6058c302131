"""What this package takes for granted about verl. A failure here names what moved; see iapo/verl_adapter."""

import inspect
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


def test_trainer_has_the_methods_that_are_overridden():
    from verl.trainer.ppo.v1 import PPOTrainerSync

    expected = {
        "_init_resource_pool_mgr": ["self"],
        "_build_replay_buffer": ["self"],
        "_compute_old_log_prob": ["self", "batch", "metrics"],
        "_compute_advantage": ["self", "batch", "metrics"],
        "_compute_metrics": ["self", "batch", "metrics", "timing_raw", "global_steps", "epoch"],
    }
    for name, signature in expected.items():
        assert parameters(getattr(PPOTrainerSync, name)) == signature, f"PPOTrainerSync.{name} changed"


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
