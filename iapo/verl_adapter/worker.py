"""The Ray worker: verl's actor worker plus the exit-entropy pass on the FSDP actor shards.

The pass is a remote method of its own, or goes with verl's log-probs and shares their forwards.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import NamedTuple

import ray
import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.debug.performance import simple_timer
from verl.utils.device import get_device_id, get_device_name
from verl.utils.profiler import DistProfiler
from verl.workers.engine_workers import ActorRolloutRefWorker

from iapo.config import IapoConfig
from iapo.information import (
    check_exactness,
    default_max_tokens,
    exit_entropies,
    exit_entropies_after,
    forward_to_share,
)
from iapo.probe.attention import can_capture
from iapo.probe.packing import Completion, forward_count, longest, places_of_sequences, probe_forwards, probe_positions
from iapo.probe.supported_models import check_model
from iapo.probe.text import final_answer, reasoning_length, step_ends
from iapo.verl_adapter.vllm_plugin import unique_job_id

# What the pass reads from TransferQueue and what it writes back, as jagged tensors.
INPUT_FIELDS = ["prompts", "responses", "response_mask"]
OUTPUT_FIELDS = ["exit_entropy", "region_mask", "probe_tokens"]


class Work(NamedTuple):
    """What this rank is to measure.

    Attributes:
        completions: by row; without the rows that verl pads a batch with, whose `response_mask` is 0.
        longest: tokens of the longest sequence of all ranks.
    """

    completions: dict[int, Completion]
    probe_ids: torch.Tensor
    max_tokens: int
    longest: int


class IapoWorker(ActorRolloutRefWorker):
    _checked = False  # whether the pass has been compared with plain forwards on this model

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        super().init_model()
        if handle := getattr(self.rollout, "zmq_handle", None):  # vLLM's
            job_id = ray.get_runtime_context().get_job_id()
            self.rollout.zmq_handle = handle.replace(job_id, unique_job_id(job_id))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    @DistProfiler.annotate(color="purple", role="exit_entropy")
    def compute_exit_entropy(self, data: TensorDict) -> TensorDict:
        """Exit entropies of this rank's completions under the current actor.

        Args:
            data: `INPUT_FIELDS` (jagged, one row per completion) and the non-tensor entry "iapo", a dict of
                `IapoConfig`.

        Returns:
            `exit_entropy`: jagged, R_i + 1 values per completion in nats, constant after its region; with
                `iapo.score=answer_logprob` the surprisals of its answer.
            `region_mask`: jagged, R_i; 1 on the tokens whose information was measured.
            `probe_tokens`: (B,) tokens that were pushed through the model for it, beside its trajectory.
            All are 0 for the rows that verl pads a batch with, whose `response_mask` is 0; they cost nothing.
        """
        work = self._work(data)
        return TensorDict(output_fields(work, self._separate_pass(work), data), batch_size=len(data))

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        """verl's log-probs; given the entry "iapo", also exit entropies, by the same forwards of the trajectories.

        The forwards and the log-probs are verl's, bit for bit. After each micro-batch its probes read the keys and
        values that its forward made, which then are freed. The separate pass is made where these can't be captured or
        where verl pads its micro-batches.

        Returns:
            verl's fields, those of `compute_exit_entropy`, and `exit_entropy_seconds`: (B,) what the latter took on
            this rank.
        """
        if "iapo" not in data.keys():
            return super().compute_log_prob(data)
        timing: dict[str, float] = {}
        with simple_timer("exit_entropy", timing):
            work = self._work(data)
        del data["iapo"]
        if self.actor.model_config.use_remove_padding and can_capture(self.actor.engine.module):
            with self._probes_after_forwards(work, data, timing) as values:
                output = super().compute_log_prob(data)
        else:
            output = super().compute_log_prob(data)
            with simple_timer("exit_entropy", timing):
                values = self._separate_pass(work)
        for name, tensor in output_fields(work, values, data).items():
            output[name] = tensor
        output["exit_entropy_seconds"] = torch.full((len(data),), timing["exit_entropy"])
        return output

    def _work(self, data: TensorDict) -> Work:
        config = IapoConfig(**tu.get_non_tensor_data(data, "iapo", None))
        probe_ids = self.actor.model_config.tokenizer.encode(config.probe, add_special_tokens=False)
        rows = zip(*(data[name].unbind() for name in INPUT_FIELDS), strict=True)
        completions = {
            i: self._completion(prompt, response, mask, config)
            for i, (prompt, response, mask) in enumerate(rows)
            if mask.any()
        }
        max_tokens = config.max_tokens_per_micro_batch or default_max_tokens(
            self.actor.engine.module.config, get_device_id()
        )
        # Ranks agree on what to refuse and on how often to call the model before the first forward: FSDP gathers
        # parameters in every forward, so a rank that makes one less, or raises alone, would leave the others waiting.
        length = self._maximum_over_ranks(longest(list(completions.values()), len(probe_ids)))
        if not self._checked:
            with self.actor.engine.eval_mode(), torch.no_grad(), self._autocast():
                check_exactness(self.actor.engine.module, probe_ids, device=get_device_id())
            self._checked = True
        return Work(completions, torch.tensor(probe_ids), max_tokens, length)

    def _separate_pass(self, work: Work) -> dict[int, torch.Tensor]:
        """Exit entropies by row, by forwards of this rank's trajectories and of their probes."""
        model, completions = self.actor.engine.module, list(work.completions.values())
        own_forwards = forward_count(completions, len(work.probe_ids), work.max_tokens)
        forwards = self._maximum_over_ranks(own_forwards)
        with self.actor.engine.eval_mode(), torch.no_grad(), self._autocast():
            check_model(model, work.longest)
            values = exit_entropies(
                model, completions, work.probe_ids, max_tokens=work.max_tokens, device=get_device_id()
            )
            self._idle_forwards(forwards - own_forwards)
        return dict(zip(work.completions, values, strict=True))

    @contextmanager
    def _probes_after_forwards(self, work: Work, data: TensorDict, timing: dict) -> Iterator[dict[int, torch.Tensor]]:
        """While inside, verl's forward of a micro-batch is followed by its probes; gives exit entropies by row.

        Ranks make equally many forwards: verl gives them equally many micro-batches, and after each they agree.
        """
        engine, device = self.actor.engine, get_device_id()
        forward_step = engine.forward_step
        values: dict[int, torch.Tensor] = {}
        lengths = data["input_ids"].offsets().diff().tolist()
        assert all(lengths[i] == len(c.prompt) + len(c.response) for i, c in work.completions.items())

        def forward_step_and_probes(micro_batch, *args, **kwargs):
            check_model(engine.module, work.longest)
            with forward_to_share(engine.module) as keys_and_values:
                result = forward_step(micro_batch, *args, **kwargs)
            with simple_timer("exit_entropy", timing), self._autocast():
                rows, offsets = micro_batch["iapo_row"].tolist(), micro_batch["input_ids"].offsets().tolist()
                starts = {i: start for i, start in zip(rows, offsets[:-1], strict=True) if i in work.completions}
                completions = [work.completions[i] for i in starts]
                places = places_of_sequences(completions, list(starts.values()))
                probes = list(probe_forwards(completions, places, work.probe_ids, work.max_tokens))
                forwards = self._maximum_over_ranks(len(probes))
                h = exit_entropies_after(engine.module, completions, probes, keys_and_values, device=device)
                values.update(zip(starts, h, strict=True))
                self._idle_forwards(forwards - len(probes))
            return result

        data["iapo_row"] = torch.arange(len(data))
        engine.forward_step = forward_step_and_probes
        try:
            yield values
        finally:
            del engine.forward_step  # the instance's, which hid the class's
            del data["iapo_row"]

    def _autocast(self) -> AbstractContextManager:
        dtype = getattr(self.actor.engine, "_autocast_dtype", torch.bfloat16)
        return nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype)

    def _idle_forwards(self, count: int) -> None:
        """What a rank without probes left makes while others have some."""
        token = torch.zeros(1, 1, dtype=torch.long, device=get_device_id())
        for _ in range(count):
            self.actor.engine.module(input_ids=token, use_cache=False)

    def _completion(self, prompt, response, mask, config: IapoConfig) -> Completion:
        tokenizer = self.actor.model_config.tokenizer
        ends = end_tokens(tokenizer, self.actor.model_config.generation_config)
        length = region_length(response, mask, config, tokenizer, ends)
        if config.probe_at == "boundaries":
            positions = probe_positions(length, boundaries=self._step_ends[response], max_gap=config.max_gap)
        else:
            positions = probe_positions(length, config.stride)
        answer = None
        if config.score == "answer_logprob":
            text = decode(tokenizer, response[: int(mask.sum())].tolist())
            answer = answer_ids(tokenizer, config.probe, final_answer(text, config.probe, config.answer_end))
        return Completion(prompt, response, positions, answer)

    @cached_property
    def _step_ends(self) -> torch.Tensor:
        tokenizer = self.actor.model_config.tokenizer
        vocabulary = self.actor.engine.module.config.get_text_config(decoder=True).vocab_size
        return step_ends(lambda ids: decode(tokenizer, ids), vocabulary)

    def _maximum_over_ranks(self, number: int) -> int:
        tensor = torch.tensor(number, device=get_device_id())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.actor.engine.get_data_parallel_group())
        return int(tensor)


def output_fields(work: Work, values: dict[int, torch.Tensor], data: TensorDict) -> dict[str, torch.Tensor]:
    """`OUTPUT_FIELDS` for every row of `data`, 0 for those without a completion."""
    masks = data["response_mask"].unbind()
    exit_entropy = [values.get(i, torch.zeros(len(mask) + 1)) for i, mask in enumerate(masks)]
    region_mask = [torch.zeros(len(mask), dtype=torch.int64) for mask in masks]
    probe_tokens = torch.zeros(len(masks), dtype=torch.int64)
    for i, completion in work.completions.items():
        length = len(completion.trajectory)
        region_mask[i][:length] = masks[i][:length]
        if not completion.nothing_to_score:
            probe_tokens[i] = len(completion.positions) * (len(work.probe_ids) + completion.answered)
    return {
        "exit_entropy": torch.nested.as_nested_tensor(exit_entropy, layout=torch.jagged),
        "region_mask": torch.nested.as_nested_tensor(region_mask, layout=torch.jagged),
        "probe_tokens": probe_tokens,
    }


def region_length(response: torch.Tensor, mask: torch.Tensor, config: IapoConfig, tokenizer, ends: set[int]) -> int:
    """Response tokens that are probed: `iapo.probe.text`, never the token that ends the completion."""
    length = int(mask.sum())
    if length and int(response[length - 1]) in ends:
        length -= 1
    if config.region == "response" or length == 0:
        return length
    return min(length, reasoning_length(response.tolist(), lambda ids: decode(tokenizer, ids), config.exit_marker))


def answer_ids(tokenizer, probe: str, answer: str) -> torch.Tensor:
    """The tokens of `answer` as they stand behind the probe; some tokenizers write a text's first word otherwise."""
    before, both = (tokenizer.encode(text, add_special_tokens=False) for text in (probe, probe + answer))
    alone = both[: len(before)] == before
    ids = both[len(before) :] if alone else tokenizer.encode(answer, add_special_tokens=False)
    return torch.tensor(ids, dtype=torch.long)


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def end_tokens(tokenizer, generation_config) -> set[int]:
    """Every token that ends a completion: the tokenizer's and those of the generation config, one or a list."""
    listed = getattr(generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])} - {None}
