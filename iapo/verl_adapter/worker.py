"""The Ray worker: verl's actor worker, with remote access to the exit-entropy pass of `iapo.verl_adapter.engine`."""

from collections.abc import Callable
from functools import partial

import ray
import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils.debug.performance import simple_timer
from verl.utils.profiler import DistProfiler
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_from_nested

import iapo.verl_adapter.engine  # noqa: F401, registers the engine
from iapo.verl_adapter import cpu
from iapo.verl_adapter.vllm_plugin import unique_job_id


class IapoWorker(ActorRolloutRefWorker):
    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        super().init_model()
        if self.actor is not None:
            self.actor.set_loss_fn(partial(loss_of_own_policy, self.loss_fn))
            cpu.use_all_cores(self.world_size)
        if handle := getattr(self.rollout, "zmq_handle", None):  # vLLM's
            job_id = ray.get_runtime_context().get_job_id()
            self.rollout.zmq_handle = handle.replace(job_id, unique_job_id(job_id))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    @DistProfiler.annotate(color="purple", role="exit_entropy")
    def compute_exit_entropy(self, data: TensorDict) -> TensorDict:
        """Exit entropies of this rank's completions under the current actor.

        Args:
            data: `engine.INPUT_FIELDS` (jagged, one row per completion) and the non-tensor entry "iapo", a dict of
                `IapoConfig`.

        Returns:
            `engine.OUTPUT_FIELDS`, see `engine.output_fields`.
        """
        return TensorDict(self.actor.engine.exit_entropy_pass(data), batch_size=len(data))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        """verl's log-probs; given the entry "iapo", also exit entropies, by the same forwards of the trajectories.

        A separate pass is made where these can't be shared.

        Returns:
            verl's fields, those of `compute_exit_entropy`, and `exit_entropy_seconds`: (B,) what the latter took on
            this rank.
        """
        if "iapo" not in data:
            return super().compute_log_prob(data)
        engine, timing = self.actor.engine, {}
        if engine.can_share_forward:
            output = super().compute_log_prob(data)
            seconds = output["exit_entropy_seconds"].values().sum().item()
        else:
            with simple_timer("exit_entropy", timing):
                fields = engine.exit_entropy_pass(data)
            del data["iapo"]
            output = super().compute_log_prob(data)
            for name, tensor in fields.items():
                output[name] = tensor
            seconds = timing["exit_entropy"]
        output["exit_entropy_seconds"] = torch.full((len(data),), seconds)
        return output


def loss_of_own_policy(loss_fn: Callable, model_output: dict, data: TensorDict, dp_group=None):
    """verl's loss. Where no old log-probs came along, the old policy is the one at hand: every ratio is exactly 1."""
    if "old_log_probs" not in data:
        own = model_output["log_probs"].detach()
        data["old_log_probs"] = response_from_nested(own, data["response_mask"])
    return loss_fn(model_output=model_output, data=data, dp_group=dp_group)
