"""The Ray worker: verl's actor worker plus one remote method, the exit-entropy pass on the FSDP actor shards."""

from contextlib import nullcontext
from functools import cached_property

import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.single_controller.base.decorator import make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.profiler import DistProfiler
from verl.workers.engine_workers import ActorRolloutRefWorker

from iapo.config import IapoConfig
from iapo.information import default_max_tokens, exit_entropies
from iapo.packing import Completion, forward_count, longest, probe_positions
from iapo.region import final_answer, reasoning_length, step_ends
from iapo.support import check_model

# What the pass reads from TransferQueue and what it writes back, as jagged tensors.
INPUT_FIELDS = ["prompts", "responses", "response_mask"]
OUTPUT_FIELDS = ["exit_entropy", "region_mask", "probe_tokens"]


class IapoWorker(ActorRolloutRefWorker):
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
        config = IapoConfig(**tu.get_non_tensor_data(data, "iapo", None))
        probe_ids = self.actor.model_config.tokenizer.encode(config.probe, add_special_tokens=False)
        prompts, responses, masks = (data[name].unbind() for name in INPUT_FIELDS)
        real = [i for i, mask in enumerate(masks) if mask.any()]
        completions = [self._completion(prompts[i], responses[i], masks[i], config) for i in real]
        engine = self.actor.engine
        max_tokens = config.max_tokens_per_micro_batch or default_max_tokens(engine.module.config, get_device_id())

        # Ranks agree on what to refuse and on how often to call the model before the first forward: FSDP gathers
        # parameters in every forward, so a rank that makes one less, or raises alone, would leave the others waiting.
        own_forwards = forward_count(completions, len(probe_ids), max_tokens)
        forwards, length = self._maximum_over_ranks(own_forwards, longest(completions, len(probe_ids)))

        dtype = getattr(engine, "_autocast_dtype", torch.bfloat16)
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype)
        with engine.eval_mode(), torch.no_grad(), autocast:
            check_model(engine.module, length)
            device = get_device_id()
            values = exit_entropies(engine.module, completions, probe_ids, max_tokens=max_tokens, device=device)
            dummy = torch.zeros(1, 1, dtype=torch.long, device=device)
            for _ in range(forwards - own_forwards):
                engine.module(input_ids=dummy, use_cache=False)

        exit_entropy = [torch.zeros(len(mask) + 1) for mask in masks]
        region_mask = [torch.zeros(len(mask), dtype=torch.int64) for mask in masks]
        probe_tokens = torch.zeros(len(masks), dtype=torch.int64)
        for i, completion, h in zip(real, completions, values, strict=True):
            length = len(completion.trajectory)
            exit_entropy[i] = h
            region_mask[i][:length] = masks[i][:length]
            if not completion.nothing_to_score:
                probe_tokens[i] = len(completion.positions) * (len(probe_ids) + completion.answered)
        output = {
            "exit_entropy": torch.nested.as_nested_tensor(exit_entropy, layout=torch.jagged),
            "region_mask": torch.nested.as_nested_tensor(region_mask, layout=torch.jagged),
            "probe_tokens": probe_tokens,
        }
        return TensorDict(output, batch_size=len(masks))

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

    def _maximum_over_ranks(self, *numbers: int) -> list[int]:
        tensor = torch.tensor(numbers, device=get_device_id())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.actor.engine.get_data_parallel_group())
        return tensor.tolist()


def region_length(response: torch.Tensor, mask: torch.Tensor, config: IapoConfig, tokenizer, ends: set[int]) -> int:
    """Response tokens that are probed: `iapo.region`, never the token that ends the completion."""
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
