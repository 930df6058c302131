"""verl's FSDP engine with the exit-entropy pass, registered under a vendor name of its own.

`VERL_ENGINE_VENDOR=iapo`, which `iapo train` sets in every process, lets verl's engine registry choose it. It is verl's
engine until a batch carries the entry "iapo", a dict of `IapoConfig`. Then the forwards that make old log-probs also
make exit entropies: after each micro-batch its probes read the keys and values that its forward made, which are freed
after that. Exit entropies are returned with `model_output`; verl concatenates its entries and puts them in the batch's
order.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.debug.performance import simple_timer
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from iapo.answer_format import FORMATS
from iapo.config import IapoConfig
from iapo.probe.attention import can_capture
from iapo.probe.joins import Joins, measured
from iapo.probe.measure import default_max_tokens, exit_entropies, exit_entropies_after, forward_to_share
from iapo.probe.naive import check_exactness
from iapo.probe.packing import Completion, forward_count, longest, probe_forwards, probe_positions, slots_of_sequences
from iapo.probe.supported_models import check_model
from iapo.probe.text import answer_ids, decode, end_tokens, region_length, step_ends
from iapo.verl_adapter import ENGINE_VENDOR
from iapo.verl_adapter.rows import jagged, separated

# What the pass reads from TransferQueue and what it writes back, as jagged tensors.
INPUT_FIELDS = ["prompts", "responses", "response_mask"]
REFERENCES = "reference_tokens"  # read too with iapo.score=reference_answer, see `iapo.verl_adapter.rows.joined`
OUTPUT_FIELDS = ["exit_entropy", "region_mask", "probe_tokens"]


class RankWork(NamedTuple):
    """What this rank is to measure of a batch or micro-batch.

    Attributes:
        rows: the row of each completion. Rows that verl pads a batch with, whose `response_mask` is 0, have none; one
            with several reference answers has as many.
        completions: what is measured.
        joins: how the probe is written after each token; None: as `probe_ids` everywhere.
        longest: tokens of the longest sequence of all ranks.
    """

    rows: list[int]
    completions: list[Completion]
    probe_ids: torch.Tensor
    max_tokens: int
    longest: int
    joins: Joins | None


def divide_by_a_token(micro_batch: TensorDict) -> None:
    """Let a mini-batch whose every token is left out of the loss have a loss of 0, as its gradient is.

    verl divides by the number of tokens: the metric would be NaN. A method that leaves completions out, such as dler,
    makes such mini-batches where a prompt's completions are one.
    """
    if tu.get_non_tensor_data(micro_batch, "batch_num_tokens", None) == 0:
        tu.assign_non_tensor(micro_batch, batch_num_tokens=1)


@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda", "npu"], vendor=ENGINE_VENDOR
)
class IapoEngine(FSDPEngineWithLMHead):
    _known_joins: tuple[tuple[str, bool], Joins] | None = None  # of the probe that was measured last
    _exact = False  # whether the pass has been compared with plain forwards of this model

    @property
    def can_share_forward(self) -> bool:
        """Whether probes can read the keys and values of verl's forwards: packed rows, an attention with a name."""
        return bool(self.model_config.use_remove_padding) and can_capture(self.module)

    def forward_step(self, micro_batch: TensorDict, loss_function, forward_only: bool):
        """verl's forward of a micro-batch, bit for bit; asked to, its probes after it.

        Ranks make equally many forwards: verl gives them equally many micro-batches, and after each they agree.
        """
        divide_by_a_token(micro_batch)
        config = iapo_config(micro_batch)
        if config is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        timing: dict[str, float] = {}
        with simple_timer("exit_entropy", timing), self._autocast():
            work = self._work(micro_batch, config)
            check_model(self.module, work.longest)
        with forward_to_share(self.module) as keys_and_values:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        with simple_timer("exit_entropy", timing), self._autocast():
            offsets = micro_batch["input_ids"].offsets().tolist()
            assert all(
                offsets[i + 1] - offsets[i] == len(c.prompt) + len(c.response)
                for i, c in zip(work.rows, work.completions, strict=True)
            )
            # The parts of a completion have its response, the same tensor.
            starts = {id(c.response): offsets[i] for i, c in zip(work.rows, work.completions, strict=True)}

            def measure(completions: Sequence[Completion]) -> list[torch.Tensor]:
                slots = slots_of_sequences(completions, [starts[id(c.response)] for c in completions])
                probes = list(probe_forwards(completions, slots, work.probe_ids, work.max_tokens))
                forwards = self._maximum_over_ranks(len(probes))
                values = exit_entropies_after(self.module, completions, probes, keys_and_values, device=get_device_id())
                self._idle_forwards(forwards - len(probes))
                return values

            values = measured(work.completions, work.joins, measure)
        fields = output_fields(work, values, micro_batch)
        seconds = torch.full((len(micro_batch), 1), timing["exit_entropy"] / len(micro_batch))
        output["model_output"] |= fields | {"exit_entropy_seconds": jagged(seconds.unbind())}
        return loss, output

    def exit_entropy_pass(self, data: TensorDict) -> dict[str, torch.Tensor]:
        """`OUTPUT_FIELDS` of a batch, by forwards of this rank's trajectories and of their probes."""
        config = iapo_config(data)
        assert config is not None, "the entry 'iapo' says what to measure"
        with self.eval_mode(), torch.no_grad(), self._autocast():
            work = self._work(data, config)
            check_model(self.module, work.longest)

            def measure(completions: Sequence[Completion]) -> list[torch.Tensor]:
                own_forwards = forward_count(completions, len(work.probe_ids), work.max_tokens)
                forwards = self._maximum_over_ranks(own_forwards)
                values = exit_entropies(
                    self.module, completions, work.probe_ids, max_tokens=work.max_tokens, device=get_device_id()
                )
                self._idle_forwards(forwards - own_forwards)
                return values

            values = measured(work.completions, work.joins, measure)
        return output_fields(work, values, data)

    # -- what to measure ----------------------------------------------------------------------------------------

    def _work(self, data: TensorDict, config: IapoConfig) -> RankWork:
        """Ranks agree on what to refuse and on how often to call the model before the first forward: FSDP gathers
        parameters in every forward, so a rank that makes one less, or raises alone, would leave the others waiting."""
        probe_ids = self.model_config.tokenizer.encode(config.probe, add_special_tokens=False)
        fields = zip(*(data[name].cpu().unbind() for name in INPUT_FIELDS), strict=True)
        found = [(i, self.completion(*row, config)) for i, row in enumerate(fields) if row[-1].any()]
        if config.score == "reference_answer":
            references = [separated(row) for row in data[REFERENCES].cpu().unbind()]
            found = [(i, completion._replace(answer=answer)) for i, completion in found for answer in references[i]]
        rows, completions = [i for i, _ in found], [completion for _, completion in found]
        max_tokens = config.max_tokens_per_micro_batch or default_max_tokens(self.module.config, get_device_id())
        joins = self._joins(config)
        parts = completions if joins is None else [part.completion for c in completions for part in joins.parts(c)]
        length = self._maximum_over_ranks(longest(parts, len(probe_ids)))
        if not self._exact:
            check_exactness(self.module, probe_ids, device=get_device_id())
            self._exact = True
        return RankWork(rows, completions, torch.tensor(probe_ids), max_tokens, length, joins)

    def _joins(self, config: IapoConfig) -> Joins | None:
        """None if the probe has the same tokens after every prefix and no answer follows."""
        tokenizer, key = self.model_config.tokenizer, (config.probe, config.probe_tokens == "natural")
        if config.probe_tokens == "ids" and config.score not in ("answer_logprob", "reference_answer"):
            return None
        if self._known_joins is None or self._known_joins[0] != key:
            joins = Joins(partial(tokenizer.encode, add_special_tokens=False), partial(decode, tokenizer), *key)
            self._known_joins = key, joins
        return self._known_joins[1]

    def completion(
        self, prompt: torch.Tensor, response: torch.Tensor, mask: torch.Tensor, config: IapoConfig
    ) -> Completion:
        """The positions to probe and the answer to score, except a reference answer."""
        tokenizer = self.model_config.tokenizer
        length = region_length(response, mask, config, tokenizer, self._end_tokens)
        if config.probe_at == "boundaries":
            positions = probe_positions(length, boundaries=self._step_ends[response], max_gap=config.max_gap)
        else:
            positions = probe_positions(length, max(length, 1) if config.probe_at == "ends" else config.stride)
        answer = None
        if config.score == "answer_logprob":
            text = decode(tokenizer, response[: int(mask.sum())].tolist())
            written = FORMATS[config.format].final_answer(text, config.probe, config.answer_end)
            answer = answer_ids(tokenizer, written)
        return Completion(prompt, response, positions, answer)

    @cached_property
    def _end_tokens(self) -> set[int]:
        return end_tokens(self.model_config.tokenizer, self.model_config.generation_config)

    @cached_property
    def _step_ends(self) -> torch.Tensor:
        vocabulary = self.module.config.get_text_config(decoder=True).vocab_size
        return step_ends(lambda ids: decode(self.model_config.tokenizer, ids), vocabulary)

    # -- ranks and precision ------------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager:
        dtype = getattr(self, "_autocast_dtype", torch.bfloat16)
        return nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype)

    def _idle_forwards(self, count: int) -> None:
        """What a rank without probes left makes while others have some."""
        token = torch.zeros(1, 1, dtype=torch.long, device=get_device_id())
        for _ in range(count):
            self.module(input_ids=token, use_cache=False)

    def _maximum_over_ranks(self, number: int) -> int:
        tensor = torch.tensor(number, device=get_device_id())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.get_data_parallel_group())
        return int(tensor)


def iapo_config(data: TensorDict) -> IapoConfig | None:
    """What a batch asks to be measured; None: nothing."""
    settings = tu.get_non_tensor_data(data, "iapo", None)
    return None if settings is None else IapoConfig(**settings)


def output_fields(work: RankWork, values: Sequence[torch.Tensor], data: TensorDict) -> dict[str, torch.Tensor]:
    """`OUTPUT_FIELDS` for every row of `data`, jagged.

    - exit_entropy: R_i + 1 values per completion in nats, constant after its region; with
      `iapo.score=answer_logprob` the surprisals of its answer, with `reference_answer` of the right one: the smallest
      at each position, if there are several.
    - region_mask: R_i; 1 on the tokens whose information was measured.
    - probe_tokens: one number, the tokens that were pushed through the model for it, without its trajectory.

    All are 0 for the rows that verl pads a batch with.
    """
    masks = data["response_mask"].unbind()
    exit_entropy = [torch.zeros(len(mask) + 1) for mask in masks]
    region_mask = [torch.zeros(len(mask), dtype=torch.int64) for mask in masks]
    probe_tokens = [torch.zeros(1, dtype=torch.int64) for _ in masks]
    seen: set[int] = set()
    for i, completion, h in zip(work.rows, work.completions, values, strict=True):
        exit_entropy[i] = torch.minimum(exit_entropy[i], h) if i in seen else h
        seen.add(i)
        length = len(completion.trajectory)
        region_mask[i][:length] = masks[i][:length]
        if not completion.nothing_to_score:
            probe_tokens[i][0] += len(completion.positions) * (len(work.probe_ids) + completion.answered)
    return dict(zip(OUTPUT_FIELDS, map(jagged, (exit_entropy, region_mask, probe_tokens)), strict=True))
