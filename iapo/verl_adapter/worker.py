"""The Ray worker: verl's actor worker, with remote access to the exit-entropy pass of `iapo.verl_adapter.engine`."""

from collections.abc import Callable
from functools import partial

import ray
import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils.debug.performance import simple_timer
from verl.utils.metric import AggregationType, Metric
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
            self.actor.set_loss_fn(partial(actor_loss, self.loss_fn))
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


def actor_loss(loss_fn: Callable, model_output: dict, data: TensorDict, dp_group=None):
    """verl's loss, with two additions.

    Where no old log-probs came along, the old policy is the current one: every ratio is exactly 1. And with a reference
    policy there is the metric `actor/kl_beyond_cut`, see `kl_beyond_cut`.
    """
    own = response_from_nested(model_output["log_probs"].detach(), data["response_mask"])
    if "old_log_probs" not in data:
        data["old_log_probs"] = own
    share = None
    if "ref_log_prob" in data:
        share = kl_beyond_cut(own.values(), data["ref_log_prob"].values(), data["response_mask"].values())
    loss, metrics = loss_fn(model_output=model_output, data=data, dp_group=dp_group)
    if share is not None:
        metrics["actor/kl_beyond_cut"] = Metric(value=share, aggregation=AggregationType.MEAN)
    return loss, metrics


def kl_beyond_cut(log_prob: torch.Tensor, ref_log_prob: torch.Tensor, mask: torch.Tensor) -> float:
    """Share of the tokens whose KL estimate k3 exceeds 10, where verl cuts it, so that low_var_kl has no gradient.

        k3 = r - log r - 1,    r = p_ref / p        (Schulman, 2020, http://joschu.net/blog/kl-approx.html)

    It is 10 at r = 13.61 and at r = e^-11. verl's low_var_kl+ has the value of k3 and the gradient of (log r)^2 / 2
    throughout.

    Args:
        log_prob, ref_log_prob: (N,) of the sampled tokens.
        mask: (N,) 1 on the tokens that have a loss.
    """
    log_ratio = (ref_log_prob - log_prob).clamp(-20, 20)
    beyond = (log_ratio.exp() - log_ratio - 1 > 10) & mask.bool()
    return (beyond.sum() / mask.bool().sum().clamp(min=1)).item()
