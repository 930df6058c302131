"""The worker's remote method on two real FSDP ranks over gloo, against the naive reference."""

import os
import re
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from iapo.config import IapoConfig
from iapo.information import exit_entropy_naive
from iapo.probe.packing import Completion, probe_positions
from tests.conftest import VOCAB, make_model
from tests.ranks import run_ranks

CONFIG = IapoConfig(alpha=1.0, max_tokens_per_micro_batch=40, exit_marker="Z", probe="pq")
Z = VOCAB - 1
EOS, OTHER_EOS = VOCAB - 2, VOCAB - 3
# (prompt length, response length, tokens before the exit marker or how the completion ends) for the two ranks: they
# need different numbers of forwards, and one holds verl's padding rows.
MANY = [(3, 13, "truncated"), (9, 1, "truncated"), (1, 20, 7), (6, 5, 0), (2, 30, "eos"), (2, 4, "other eos")]
ROWS = {
    "some padding": [MANY, [(4, 2, "truncated"), (7, 1, "padding")]],
    "only padding": [MANY, [(4, 2, "padding"), (7, 1, "padding")]],
}
# How verl wraps a model: strategy, are the embeddings tied, wrap policy, is the output layer a unit of its own?
WRAPPINGS = {
    "fsdp2": ("fsdp2", False, {}, True),
    "fsdp2 tied": ("fsdp2", True, {}, False),
    "fsdp1": ("fsdp", False, {}, False),
    "fsdp1 tied": ("fsdp", True, {}, False),
    "fsdp1 by size": ("fsdp", False, {"min_num_params": 3000}, True),
}


class Tokenizer:
    """Decodes a few tokens to letters of their own, all others to x; encodes letters, and 1p as one token."""

    eos_token_id = EOS
    letters: ClassVar = {5: "p", 11: "q", 12: "1", 13: "2", 14: "e", 15: ".", Z: "Z", 10: "1p", 1: "x"}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        pieces = re.findall("1p|.", text)
        return [next(token for token, own in self.letters.items() if own == piece) for piece in pieces]

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(self.letters.get(int(i), "x") for i in ids)


def make_worker(model):
    """`IapoWorker` over an engine that is verl's but for its set-up."""
    from iapo.verl_adapter.engine import IapoEngine
    from iapo.verl_adapter.worker import IapoWorker

    class Engine(IapoEngine):
        _autocast_dtype = torch.float32

        def __init__(self):
            generation_config = SimpleNamespace(eos_token_id=[EOS, OTHER_EOS])
            self.module = model
            self.model_config = SimpleNamespace(tokenizer=Tokenizer(), generation_config=generation_config)

        def eval_mode(self):
            return nullcontext()

        def get_data_parallel_group(self):
            return torch.distributed.group.WORLD

    worker = object.__new__(IapoWorker)
    worker.actor = SimpleNamespace(engine=Engine())
    return worker


def make_rows(batch, rank):
    generator = torch.Generator().manual_seed(rank)
    rows = []
    for prompt_length, length, marker in ROWS[batch][rank]:
        prompt = torch.randint(0, OTHER_EOS, (prompt_length,), generator=generator)
        response = torch.randint(0, OTHER_EOS, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.long)
        region = length
        if marker == "padding":
            mask[:], region = 0, 0
        elif marker in ("eos", "other eos"):
            response[-1], region = {"eos": EOS, "other eos": OTHER_EOS}[marker], length - 1
        elif marker != "truncated":
            response[marker], region = Z, marker
        rows.append((Completion(prompt, response, probe_positions(region)), mask))
    return rows


def wrap(model, strategy, policy):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from verl.utils.fsdp_utils import apply_fsdp2, get_fsdp_wrap_policy

    mesh = dist.init_device_mesh("cpu", (2,))
    if strategy == "fsdp2":
        apply_fsdp2(model, {"mesh": mesh}, {"wrap_policy": policy})
        return model
    # As verl calls it, but for sync_module_states, which torch refuses for parameters on a CPU.
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=get_fsdp_wrap_policy(model, policy),
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        device_mesh=mesh,
        use_orig_params=False,
    )


def make_data(rows):
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    def jagged(tensors):
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    data = TensorDict(
        {
            "prompts": jagged([row.prompt for row, _ in rows]),
            "responses": jagged([row.response for row, _ in rows]),
            "response_mask": jagged([mask for _, mask in rows]),
        },
        batch_size=len(rows),
    )
    tu.assign_non_tensor_data(data, "iapo", asdict(CONFIG))
    return data


def run_rank(rank, folder):
    os.environ["VERL_PLATFORM"] = "cpu"
    # FlexAttention without compiling, which takes longer than all forwards.
    torch._dynamo.config.disable = True
    torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    torch.set_num_threads(1)
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    from iapo.verl_adapter.engine import OUTPUT_FIELDS

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    forwards = []
    for name, (strategy, tied, policy, own_unit) in WRAPPINGS.items():
        model = wrap(make_model("qwen2", tie_word_embeddings=tied), strategy, policy).eval()
        assert isinstance(model.get_output_embeddings(), (FSDPModule, FullyShardedDataParallel)) == own_unit
        # Like flash attention it takes no 4-D mask of ours and must be switched for the pass.
        model.set_attn_implementation("flex_attention")
        worker = make_worker(model)
        model.register_forward_pre_hook(lambda _, __, kw: forwards.append(kw["input_ids"].numel()), with_kwargs=True)
        worker.compute_exit_entropy(make_data(make_rows("some padding", rank)))  # compares with plain forwards, once
        assert len(forwards) > 10
        for batch in ROWS:
            forwards.clear()
            result = worker.compute_exit_entropy(make_data(make_rows(batch, rank)))
            assert model.config._attn_implementation == "flex_attention"
            fields = [[row.clone() for row in result[key].unbind()] for key in OUTPUT_FIELDS]
            torch.save((fields, forwards), folder / f"{name} {batch} {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with what each rank returned, and the tokens of its forwards, for each of `WRAPPINGS` and `ROWS`."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, folder)
    return folder


@pytest.mark.e2e
@pytest.mark.timeout(400)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("batch", ROWS)
def test_two_ranks_equal_the_naive_reference(results, wrapping, batch):
    model = make_model("qwen2", tie_word_embeddings=WRAPPINGS[wrapping][1])
    counts = set()
    for rank in range(2):
        fields, forwards = torch.load(results / f"{wrapping} {batch} {rank}.pt")
        tokens = 0
        for (row, mask), h, region, probe_tokens in zip(make_rows(batch, rank), *fields, strict=True):
            n = len(row.trajectory)
            assert len(h) == len(row.response) + 1 and (h[n:] == h[n]).all()
            assert region.tolist() == [1] * n + [0] * (len(mask) - n)
            if not mask.any():
                assert h[0] == probe_tokens == 0
                continue
            ids = torch.cat([row.prompt, row.trajectory])[None]
            everything = torch.ones_like(ids)
            expected = exit_entropy_naive(model, ids, everything, everything[:, len(row.prompt) :], [5, 11])[0]
            torch.testing.assert_close(h[: n + 1], expected, atol=1e-5, rtol=0)
            assert probe_tokens == 2 * (n + 1)
            tokens += ids.numel() + probe_tokens
        assert sum(n for n in forwards if n > 1) == tokens  # the others only keep the ranks in step
        counts.add(len(forwards))
    assert len(counts) == 1


def test_probes_stand_at_boundaries_and_score_the_completions_own_answer():
    engine = make_worker(make_model("qwen2")).actor.engine
    #         x  x  .  x  x  x  x  x  x  Z  p   q   1   2   e   EOS
    tokens = [1, 2, 15, 3, 4, 6, 7, 8, 9, Z, 5, 11, 12, 13, 14, EOS]
    response, mask = torch.tensor(tokens), torch.ones(len(tokens), dtype=torch.long)
    settings = dict(exit_marker="Z", probe="pq", answer_end="e", probe_at="boundaries", max_gap=4)
    config = IapoConfig(score="answer_logprob", **settings)
    prompt = torch.tensor([7])
    row = engine.completion(prompt, response, mask, config)
    assert row.positions.tolist() == [0, 3, 6, 9]
    assert row.answer.tolist() == [12, 13]
    for score in ("first_token_entropy", "next_token_entropy"):  # the latter has the pass in validation only
        assert engine.completion(prompt, response, mask, IapoConfig(score=score, **settings)).answer is None
    truncated = engine.completion(prompt, response[:14], mask[:14], config)
    assert truncated.answer.tolist() == [] and truncated.positions.tolist() == [0, 3, 6, 9]
