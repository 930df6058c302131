"""verl's synchronous replay buffer, with every sampled batch shown to the trainer before anything is made of it."""

import inspect
from collections.abc import Callable

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from iapo.metrics.console import Progress

# What verl's buffer says when every rollout of a training step failed.
NO_COMPLETION = "Sync replay buffer selected terminal groups with no materializable trajectories."


class NoCompletion(RuntimeError):
    """Not one of a batch's rollouts gave a completion."""

    def __init__(self, prompts: int, step: int):
        super().__init__(
            f"rollout: none of the {prompts} prompts of step {step} gave a completion; the first error is in the log "
            "above, from the rollout worker."
        )


class IapoReplayBuffer(ReplayBuffer):
    """verl's hooks `on_sample_begin` and `on_sample_end` don't see the batch and don't run for validation; this does.

    Args:
        built: verl's own buffer, whose arguments this one takes over: verl keeps each under its name.
        on_batch: called with every sampled batch, its metrics, which may be added to, and the prompts asked for.
        poll_interval: seconds between two looks for finished rollouts.
    """

    def __init__(
        self, built: ReplayBuffer, on_batch: Callable[[KVBatchMeta, dict, int], None], poll_interval: float | None
    ):
        names = list(inspect.signature(ReplayBuffer.__init__).parameters)[1:]
        super().__init__(**{name: getattr(built, name) for name in names})
        self.poll_interval = poll_interval or built.poll_interval
        self.on_batch = on_batch
        self._progress = Progress("")
        self._asked = 0

    def sample(self, *, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        """A batch of finished prompts, with its rows ordered and checked by `on_batch`.

        Raises:
            NoCompletion: where verl's own message is obscure, or an empty batch would be returned.
        """
        self._progress = Progress("validation" if partition_id == "val" else f"rollouts of step {global_steps}")
        self._asked = batch_size
        try:
            batch, metrics = super().sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
        except RuntimeError as error:
            if NO_COMPLETION not in str(error):
                raise
            raise NoCompletion(batch_size, global_steps) from error
        if len(batch) == 0:
            raise NoCompletion(batch_size, global_steps)
        self.on_batch(batch, metrics, batch_size)
        return batch, metrics

    def _sampleable_terminal_keys(self, partition_id: str, *args):
        """verl calls this at every look for finished rollouts."""
        keys = super()._sampleable_terminal_keys(partition_id, *args)
        self._progress.show(len(keys), self._asked)
        return keys
