import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo import information
from iapo.information import (
    entropy,
    exit_entropy,
    exit_entropy_naive,
    forward_count,
    information_gain,
    information_rate,
    probe_positions,
)
from tests.conftest import CONFIGS, VOCAB, make_batch, make_model

PROBE = [5, 11, 7]
LENGTHS = ([3, 9, 1, 6, 4], [13, 0, 1, 20, 7])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_equals_naive_for_every_family(models, family, chunk_size):
    batch = make_batch(*LENGTHS)
    expected = exit_entropy_naive(models[family], *batch, PROBE)
    result = exit_entropy(models[family], *batch, PROBE, chunk_size=chunk_size)
    assert expected.std() > 0.05  # the entropies differ, so equality says something
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_naive_for_both_mask_forms(models, implementation):
    model = make_model("qwen2")
    model.set_attn_implementation(implementation)
    batch = make_batch(*LENGTHS)
    expected = exit_entropy_naive(models["qwen2"], *batch, PROBE)
    torch.testing.assert_close(exit_entropy(model, *batch, PROBE, chunk_size=7), expected, atol=1e-5, rtol=0)


def test_restores_an_attention_that_takes_no_mask(models):
    model = make_model("qwen2")
    batch = make_batch(*LENGTHS)
    expected = exit_entropy_naive(models["qwen2"], *batch, PROBE)
    model.set_attn_implementation("flex_attention")
    result = exit_entropy(model, *batch, PROBE, chunk_size=7)
    assert model.config._attn_implementation == "flex_attention"
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 17)), min_size=1, max_size=4),
    chunk_size=st.integers(1, 30),
    stride=st.integers(1, 6),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    probe=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_equals_naive_for_random_shapes(models, rows, chunk_size, stride, padding, probe, seed):
    prompts, responses = zip(*rows, strict=True)
    batch = make_batch(prompts, responses, seed, *padding)
    expected = exit_entropy_naive(models["qwen2"], *batch, probe, stride=stride)
    result = exit_entropy(models["qwen2"], *batch, probe, chunk_size=chunk_size, stride=stride)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_result_does_not_depend_on_batch_order_or_neighbours(models):
    input_ids, attention_mask, response_mask = make_batch(*LENGTHS)
    result = exit_entropy(models["llama"], input_ids, attention_mask, response_mask, PROBE, chunk_size=4)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = exit_entropy(
        models["llama"], input_ids[order], attention_mask[order], response_mask[order], PROBE, chunk_size=4
    )
    torch.testing.assert_close(permuted, result[order], atol=1e-5, rtol=0)
    for b in range(len(input_ids)):
        row = slice(b, b + 1)
        alone = exit_entropy(
            models["llama"], input_ids[row], attention_mask[row], response_mask[row], PROBE, chunk_size=4
        )
        torch.testing.assert_close(alone, result[row], atol=1e-5, rtol=0)


def test_a_shorter_region_gives_the_same_values_and_stays_constant(models):
    input_ids, attention_mask, response_mask = make_batch([4, 6], [12, 9])
    whole = exit_entropy(models["qwen2"], input_ids, attention_mask, response_mask, PROBE, chunk_size=5)
    region = response_mask.clone()
    region[:, 5:] = 0
    result = exit_entropy(models["qwen2"], input_ids, attention_mask, region, PROBE, chunk_size=5)
    torch.testing.assert_close(result[:, :6], whole[:, :6], atol=1e-5, rtol=0)
    assert (result[:, 5:] == result[:, 5:6]).all()


def test_stride_keeps_probed_values_and_the_sum_of_gains(models):
    batch = make_batch([4, 6, 3], [12, 9, 1])
    dense = exit_entropy(models["qwen2"], *batch, PROBE, chunk_size=64)
    sparse = exit_entropy(models["qwen2"], *batch, PROBE, chunk_size=64, stride=4)
    for t in (0, 4, 8, 12):
        torch.testing.assert_close(sparse[0, t], dense[0, t], atol=1e-5, rtol=0)
    middle = dense[0, 4] + (dense[0, 8] - dense[0, 4]) * 0.25
    torch.testing.assert_close(sparse[0, 5], middle, atol=1e-5, rtol=0)
    gains = [information_gain(h, batch[2]).sum(1) for h in (dense, sparse)]
    torch.testing.assert_close(gains[0], gains[1], atol=2e-5, rtol=0)


def test_probe_positions_by_hand():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert probe_positions(mask).tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 2, 2], [0] * 6]
    assert probe_positions(mask, stride=2).tolist() == [[0, 2, 4, 5], [0, 2, 2, 2], [0, 0, 0, 0]]
    assert forward_count(mask, chunk_size=4) == 3
    assert forward_count(mask, chunk_size=6) == 2
    assert forward_count(mask[2:], chunk_size=6) == 2


@pytest.mark.parametrize("chunk_size,stride", [(1, 1), (4, 1), (4, 3), (64, 1)])
def test_forward_count_is_the_number_of_forwards(models, chunk_size, stride):
    calls = []
    handle = models["qwen2"].register_forward_hook(lambda *_: calls.append(1))
    batch = make_batch(*LENGTHS)
    exit_entropy(models["qwen2"], *batch, PROBE, chunk_size=chunk_size, stride=stride)
    handle.remove()
    assert len(calls) == forward_count(batch[2], chunk_size=chunk_size, stride=stride)


def test_bf16_error_is_that_of_the_weights_not_of_the_logits():
    """Same bf16 hidden states: fp32 logits and entropies agree with fp64 to 1e-4 nats, bf16 logits don't."""
    model = make_model("qwen2").to(torch.bfloat16)
    hidden = []
    handle = model.get_output_embeddings().register_forward_hook(lambda layer, args, _: hidden.append(args[0]))
    batch = make_batch([5], [1])
    result = exit_entropy(model, *batch, PROBE, chunk_size=8)
    handle.remove()
    assert result.dtype == torch.float32
    weight = model.get_output_embeddings().weight
    exact = entropy_fp64(hidden[-1].double() @ weight.double().T)
    rounded = entropy_fp64((hidden[-1] @ weight.T).double())
    assert (result - exact).abs().max() < 1e-4
    assert (rounded - exact).abs().max() > 1e-4


def entropy_fp64(logits):
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def test_entropy_by_hand():
    assert entropy(torch.zeros(4)).item() == pytest.approx(math.log(4))
    assert entropy(torch.tensor([0.0, -math.inf])).item() == 0.0
    two_to_one = torch.tensor([math.log(2), 0.0])
    assert entropy(two_to_one).item() == pytest.approx(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))


def test_gain_and_rate_by_hand():
    h = torch.tensor([[3.0, 2.5, 2.75, 1.0], [2.0, 1.5, 1.5, 1.5], [4.0, 4.0, 4.0, 4.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert information_gain(h, mask).tolist() == [[0.5, -0.25, 1.75], [0.5, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(information_rate(h, mask), torch.tensor([2 / 3, 0.5, 0.0]))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(probe_ids=[]), "probe_ids: \\[\\] must be a non-empty"),
        (dict(probe_ids=[VOCAB]), "probe_ids: \\[97\\]"),
        (dict(chunk_size=0), "chunk_size: 0"),
        (dict(stride=1.5), "stride: 1.5"),
        (dict(response_mask=torch.ones(2, 99)), "response_mask: shape"),
        (dict(response_mask=torch.ones(2, 6)), "response_mask: marks padding"),
        (dict(attention_mask=torch.ones(2, 3)), "attention_mask: shape"),
        (dict(attention_mask=torch.zeros(2, 10)), "left-padded"),
        (dict(attention_mask=torch.tensor([[1, 0, 1, 1] + [1] * 6, [1] * 10])), "left-padded"),
        (dict(attention_mask=torch.tensor([[1] * 7 + [0, 1, 1], [1] * 10])), "right-padded"),
    ],
)
@pytest.mark.parametrize("function", [exit_entropy, exit_entropy_naive])
def test_bad_input_names_the_argument(models, function, change, message):
    input_ids, attention_mask, response_mask = make_batch([4, 2], [6, 3])
    arguments = dict(
        input_ids=input_ids, attention_mask=attention_mask, response_mask=response_mask, probe_ids=PROBE, chunk_size=4
    )
    with pytest.raises(ValueError, match=message):
        function(models["qwen2"], **(arguments | change))


def test_training_mode_is_refused():
    model = make_model("qwen2").train()
    with pytest.raises(ValueError, match="model.eval"):
        exit_entropy(model, *make_batch([2], [3]), PROBE, chunk_size=4)


def refuse(config):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    exit_entropy(model, *make_batch([4], [20]), PROBE, chunk_size=4)


SMALL = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize(
    "config,reason",
    [
        (transformers.MistralConfig(**SMALL, num_key_value_heads=2, intermediate_size=64, sliding_window=16), "16 tok"),
        (
            transformers.Qwen2Config(
                **SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=16, max_window_layers=1
            ),
            "16 tokens",
        ),
        (transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=20), "learned pos"),
        (transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4), "position_ids"),
        (
            transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1),
            "mamba.*no standard KV cache",
        ),
        (
            transformers.LlamaConfig(
                **SMALL,
                intermediate_size=64,
                max_position_embeddings=16,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            ),
            "change with the length",
        ),
    ],
    ids=["mistral-window", "qwen2-window", "gpt2-short", "bloom-alibi", "mamba", "llama-dynamic-rope"],
)
def test_models_that_would_be_wrong_are_refused(config, reason):
    with pytest.raises(ValueError, match=reason):
        refuse(config)


def test_a_window_longer_than_the_sequence_is_served():
    config = CONFIGS["mistral"]()
    config.sliding_window = 64
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    batch = make_batch([4], [20])
    expected = exit_entropy_naive(model, *batch, PROBE)
    torch.testing.assert_close(exit_entropy(model, *batch, PROBE, chunk_size=6), expected, atol=1e-5, rtol=0)


def test_a_lora_model_is_served():
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(make_model("qwen2"), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch([5, 2], [6, 3])
    expected = exit_entropy_naive(lora, *batch, PROBE)
    assert (expected - exit_entropy_naive(make_model("qwen2"), *batch, PROBE)).abs().max() > 0.01
    torch.testing.assert_close(exit_entropy(lora, *batch, PROBE, chunk_size=4), expected, atol=1e-5, rtol=0)


def test_fp32_hook_is_removed(models):
    exit_entropy(models["qwen2"], *make_batch([2], [3]), PROBE, chunk_size=4)
    assert not models["qwen2"].get_output_embeddings()._forward_hooks


def test_vocabulary_slices_change_nothing(monkeypatch):
    model = make_model("qwen2").to(torch.bfloat16)
    batch = make_batch([5, 2], [6, 3])
    whole = exit_entropy(model, *batch, PROBE, chunk_size=8)
    monkeypatch.setattr(information, "_VOCABULARY_SLICE", 10)
    torch.testing.assert_close(exit_entropy(model, *batch, PROBE, chunk_size=8), whole, atol=1e-6, rtol=0)
