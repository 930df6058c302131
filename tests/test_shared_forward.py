"""Exit entropies by verl's own log-prob forwards, with its real FSDP2 engine and training worker on two gloo ranks."""

import os
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from iapo.information import Joins, exit_entropies_naive
from iapo.probe.joins import measured
from iapo.probe.text import decode
from iapo.verl_adapter.rows import joined, separated
from tests.conftest import make_model
from tests.ranks import run_ranks
from tests.test_worker import CONFIG, EOS, OTHER_EOS, Tokenizer, make_rows

REFERENCE = replace(CONFIG, score="reference_answer", answer_end="e")
CONFIGS = {
    "every position": CONFIG,
    "stride": replace(CONFIG, stride=3),
    "boundaries": replace(CONFIG, probe_at="boundaries", max_gap=4),
    "answer": replace(CONFIG, score="answer_logprob", answer_end="e"),
    "reference": REFERENCE,
    "reference, stride": replace(REFERENCE, stride=3),
    "reference, boundaries": replace(REFERENCE, probe_at="boundaries", max_gap=4),
    "natural": replace(CONFIG, probe_tokens="natural"),
    "ends": replace(CONFIG, alpha=0.0, rho=1.0).in_training,
}
CASES = [*(("some padding", name) for name in CONFIGS), ("only padding", "every position")]
KINDS = {
    "shared": dict(override_config={"attn_implementation": "sdpa"}),
    "packed": dict(override_config={"attn_implementation": "iapo_packed"}),
    "eager": dict(override_config={"attn_implementation": "eager"}),
    "padded": dict(override_config={"attn_implementation": "sdpa"}, use_remove_padding=False),
}
LOG_PROBS = ["log_probs", "entropy"]
EXIT_ENTROPIES = ["exit_entropy", "region_mask", "probe_tokens"]


def make_worker(folder, **model_config):
    """`IapoWorker` with the model in `folder`, as `init_model` builds it, without a rollout server."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    from iapo.verl_adapter.worker import IapoWorker

    engine_config = FSDPEngineConfig(
        strategy="fsdp2",
        forward_only=True,
        model_dtype="fp32",
        mixed_precision=dict(param_dtype="fp32", reduce_dtype="fp32", buffer_dtype="fp32"),
        use_torch_compile=False,
        infer_max_token_len_per_gpu=60,
    )
    model_config = HFModelConfig(path=str(folder), load_tokenizer=False, **model_config)
    model_config.tokenizer = Tokenizer()
    model_config.generation_config = SimpleNamespace(eos_token_id=[EOS, OTHER_EOS])
    worker = object.__new__(IapoWorker)
    worker.enable_routing_replay = False
    worker.actor = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model_config,
            engine_config=engine_config,
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.actor.reset()
    return worker


def make_data(rows, config=None):
    """What verl's trainer sends for old log-probs, with our entry if there is a `config`."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    def jagged(tensors):
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    sequences = [torch.cat([row.prompt, row.response]) for row, _ in rows]
    data = TensorDict(
        {
            "prompts": jagged([row.prompt for row, _ in rows]),
            "responses": jagged([row.response for row, _ in rows]),
            "response_mask": jagged([mask for _, mask in rows]),
            "loss_mask": jagged([mask for _, mask in rows]),
            "input_ids": jagged(sequences),
            "position_ids": jagged([torch.arange(len(sequence)) for sequence in sequences]),
        },
        batch_size=len(rows),
    )
    tu.assign_non_tensor(data, temperature=0.7, calculate_entropy=True, compute_loss=False)
    if config is not None and config.score == "reference_answer":
        data["reference_tokens"] = jagged([joined(references_of(i)) for i in range(len(rows))])
    if config is not None:
        tu.assign_non_tensor_data(data, "iapo", asdict(config))
    return data


def references_of(row):
    """Right answers with what ends them; two for every other row."""
    return [torch.tensor([12, 13, 14]), *([torch.tensor([[5, 11, 15][row % 3], 14])] if row % 2 else [])]


def answering_rows(batch, rank):
    """The rows of the worker's test; those with room for it write the probe and the answer "12" near their end."""
    rows = make_rows(batch, rank)
    for row, _ in rows:
        if len(row.response) >= 13:
            row.response[-6:-1] = torch.tensor([5, 11, 12, 13, 14])
    return rows


def rows_of(result, names):
    return {name: [row.clone() for row in result[name].unbind()] for name in names}


def run_rank(rank, port, folder):
    os.environ.update(VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), VERL_ENGINE_VENDOR="iapo")
    torch.set_num_threads(1)
    import torch.distributed as dist

    forwards = []
    for kind, settings in KINDS.items():
        worker = make_worker(folder, **settings)
        worker.actor.engine.module.register_forward_hook(lambda *_: forwards.append(1))
        first_batch, first_config = CASES[0]
        # The first call compares the pass with plain forwards.
        worker.compute_exit_entropy(make_data(answering_rows(first_batch, rank), CONFIGS[first_config]))
        for batch, name in CASES if kind == "shared" else CASES[:1]:
            rows, config = answering_rows(batch, rank), CONFIGS[name]
            alone = worker.compute_log_prob(make_data(rows))
            assert "exit_entropy" not in alone
            forwards.clear()
            together = worker.compute_log_prob(make_data(rows, config))
            calls = len(forwards)
            assert (together["exit_entropy_seconds"] > 0).all()
            for a, b in zip(*(rows_of(result, LOG_PROBS).values() for result in (alone, together)), strict=True):
                assert all(map(torch.equal, a, b))
            forwards.clear()
            separate = worker.compute_exit_entropy(make_data(rows, config))
            torch.save(
                dict(
                    calls=calls,
                    separate_calls=len(forwards),
                    shared=rows_of(together, EXIT_ENTROPIES),
                    separate=rows_of(separate, EXIT_ENTROPIES),
                ),
                folder / f"{kind}-{batch}-{name}-{rank}.pt",
            )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    import socket

    folder = tmp_path_factory.mktemp("model")
    make_model("qwen2").save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_ranks(run_rank, port, folder)
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize("batch,name", CASES)
def test_shared_equals_separate(results, batch, name):
    """`run_rank` compares log-probs and entropies, which must be equal bit for bit."""
    for rank in range(2):
        result = results[f"shared-{batch}-{name}-{rank}"]
        for a, b in zip(result["shared"]["exit_entropy"], result["separate"]["exit_entropy"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-6)
        for field in ("region_mask", "probe_tokens"):
            assert all(map(torch.equal, result["shared"][field], result["separate"][field]))
    first, second = (results[f"shared-{batch}-{name}-{rank}"] for rank in range(2))
    assert torch.cat(first["shared"]["exit_entropy"]).std() > 0.1  # so equality says something
    assert first["calls"] == second["calls"]  # although the ranks' work is unequal


@pytest.mark.e2e
def test_shared_equals_the_naive_reference(results):
    model = make_model("qwen2")
    for rank in range(2):
        values = results[f"shared-some padding-every position-{rank}"]["shared"]["exit_entropy"]
        for (row, mask), h in zip(answering_rows("some padding", rank), values, strict=True):
            (expected,) = exit_entropies_naive(model, [row], [5, 11])
            torch.testing.assert_close(h, expected if mask.any() else 0 * expected, atol=1e-5, rtol=0)


def test_only_the_ends_are_probed_where_nothing_else_is_read(results):
    for rank in range(2):
        every, ends = (results[f"shared-some padding-{name}-{rank}"]["shared"] for name in ("every position", "ends"))
        probed = [each["probe_tokens"] for each in (every, ends)]
        for h, other, all_tokens, tokens in zip(every["exit_entropy"], ends["exit_entropy"], *probed, strict=True):
            torch.testing.assert_close(other[[0, -1]], h[[0, -1]], atol=1e-5, rtol=1e-6)
            assert int(tokens) == min(int(all_tokens), 2 * 2)  # a probe has two tokens


def test_probes_that_are_written_with_the_token_before(results):
    model, tokenizer = make_model("qwen2"), Tokenizer()
    joins = Joins(partial(tokenizer.encode, add_special_tokens=False), partial(decode, tokenizer), CONFIG.probe)
    differing = 0
    for rank in range(2):
        values = results[f"shared-some padding-natural-{rank}"]["shared"]["exit_entropy"]
        plain = results[f"shared-some padding-every position-{rank}"]["shared"]["exit_entropy"]
        for (row, mask), h, other in zip(answering_rows("some padding", rank), values, plain, strict=True):
            (expected,) = measured([row], joins, lambda parts: exit_entropies_naive(model, parts, [5, 11]))
            torch.testing.assert_close(h, expected if mask.any() else 0 * expected, atol=2e-5, rtol=0)
            differing += int(((h - other).abs() > 1e-4).sum())
    assert differing > 0


def test_of_several_right_answers_the_most_probable_one_counts(results):
    model = make_model("qwen2")
    for rank in range(2):
        values = results[f"shared-some padding-reference-{rank}"]["shared"]["exit_entropy"]
        for i, ((row, mask), h) in enumerate(zip(answering_rows("some padding", rank), values, strict=True)):
            each = exit_entropies_naive(model, [row._replace(answer=answer) for answer in references_of(i)], [5, 11])
            expected = torch.stack(each).amin(0)
            torch.testing.assert_close(h, expected if mask.any() else 0 * expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["reference, stride", "reference, boundaries"])
def test_right_answers_are_scored_at_fewer_positions_too(results, name):
    """At every third token, or where a step ends, the values are those of every position."""
    fewer = 0
    for rank in range(2):
        every, some = (results[f"shared-some padding-{key}-{rank}"]["shared"] for key in ("reference", name))
        for h, other, mask in zip(every["exit_entropy"], some["exit_entropy"], every["region_mask"], strict=True):
            length = int(mask.sum())
            probed = [*range(0, length, 3), length] if "stride" in name else [0, length]
            torch.testing.assert_close(other[probed], h[probed], atol=2e-5, rtol=0)
        fewer += sum(int(a) > int(b) for a, b in zip(every["probe_tokens"], some["probe_tokens"], strict=True))
    assert fewer > 2


def test_answers_in_one_row_of_the_store_come_out_as_they_went_in():
    for row in (1, 2):
        assert [x.tolist() for x in separated(joined(references_of(row)))] == [x.tolist() for x in references_of(row)]


def test_attention_per_sequence_shares_its_forwards_too(results):
    for rank in range(2):
        packed, masked = (results[f"{kind}-some padding-every position-{rank}"] for kind in ("packed", "shared"))
        assert packed["calls"] == masked["calls"] < packed["separate_calls"] + 2
        for a, b in zip(packed["shared"]["exit_entropy"], masked["shared"]["exit_entropy"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["eager", "padded"])
def test_the_separate_pass_is_made_where_nothing_can_be_shared(results, kind):
    for rank in range(2):
        result = results[f"{kind}-some padding-every position-{rank}"]
        assert result["calls"] == result["separate_calls"] + 2  # verl's two micro-batches
        for field in EXIT_ENTROPIES:
            assert all(map(torch.equal, result["shared"][field], result["separate"][field]))
