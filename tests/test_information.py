import inspect
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from iapo.information import (
    check_exactness,
    entropy,
    exit_entropies,
    exit_entropies_after,
    exit_entropies_naive,
    exit_entropy,
    exit_entropy_naive,
    forward_to_share,
    information_gain,
    information_rate,
)
from iapo.probe import attention, module_forward, output_layer, packing
from iapo.probe.measure import default_max_tokens, interpolate
from iapo.probe.naive import interpolated
from iapo.probe.output_layer import entropy_and_log_prob
from tests.conftest import CONFIGS, DEVICES, VOCAB, make_batch, make_model

PROBE = [5, 11, 7]
LENGTHS = ([3, 9, 1, 6, 4], [13, 0, 1, 20, 7])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
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


@settings(max_examples=60)
@given(
    family=st.sampled_from(sorted(CONFIGS)),
    rows=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 17), st.integers(0, 3)), min_size=1, max_size=4),
    chunk_size=st.none() | st.integers(1, 30),
    max_tokens=st.integers(1, 200),
    masked_share=st.sampled_from([0, packing.MASKED_SHARE, 1e6]),
    stride=st.integers(1, 6),
    at_boundaries=st.booleans(),
    scores_answers=st.booleans(),
    shared_prompts=st.booleans(),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    probe=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_equals_naive_for_random_shapes(
    models,
    family,
    rows,
    chunk_size,
    max_tokens,
    masked_share,
    stride,
    at_boundaries,
    scores_answers,
    shared_prompts,
    padding,
    probe,
    seed,
):
    prompts, responses, answered = zip(*rows, strict=True)
    if shared_prompts:
        prompts = prompts[:1] * len(rows)
    input_ids, attention_mask, response_mask = make_batch(prompts, responses, seed, *padding)
    if shared_prompts:
        width = input_ids.shape[1] - response_mask.shape[1]
        input_ids[:, :width] = input_ids[0, :width].clone()
    generator = torch.Generator().manual_seed(seed)
    options = dict(stride=stride, max_gap=stride + 1)
    if at_boundaries:
        options["boundaries"] = torch.rand(response_mask.shape, generator=generator) < 0.3
    if scores_answers:
        options["answers"] = [torch.randint(0, VOCAB, (n,), generator=generator) for n in answered]
    batch = input_ids, attention_mask, response_mask, probe
    expected = exit_entropy_naive(models[family], *batch, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MASKED_SHARE", masked_share)
        result = exit_entropy(models[family], *batch, chunk_size=chunk_size, max_tokens=max_tokens, **options)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
def test_answers_equal_naive_for_every_family(models, family):
    batch = make_batch(*LENGTHS)
    answers = [torch.tensor(ids, dtype=torch.long) for ids in ([1, 2], [3], [4, 5, 6], [7], [])]
    expected = exit_entropy_naive(models[family], *batch, PROBE, answers=answers)
    result = exit_entropy(models[family], *batch, PROBE, answers=answers, max_tokens=50)
    assert expected[:4].std() > 0.5 and (expected[4] == 0).all()
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-6)


def test_the_surprisal_of_one_token_answers_bounds_the_entropy(models):
    """H = sum_a p(a) (-log p(a)): scoring every word of the vocabulary as the answer gives the entropy again."""
    batch = make_batch([4], [3])
    every_word = [torch.tensor([word]) for word in range(VOCAB)]
    copies = [x.expand(VOCAB, -1) for x in batch]
    surprisals = exit_entropy(models["llama"], *copies, PROBE, answers=every_word).double()
    expected = exit_entropy(models["llama"], *batch, PROBE)[0]
    torch.testing.assert_close(((-surprisals).exp() * surprisals).sum(0).float(), expected, atol=1e-5, rtol=0)


def test_a_capped_attention_and_output_are_measured_as_the_model_computes_them():
    """Gemma 2 in eager mode caps scores and logits; both must reach the entropies."""
    model = make_model("gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    batch = make_batch(*LENGTHS)
    uncapped = exit_entropy_naive(make_model("gemma2", final_logit_softcapping=None), *batch, PROBE)
    for implementation in ("eager", "sdpa"):  # transformers' sdpa drops the cap of the scores
        model.set_attn_implementation(implementation)
        expected = exit_entropy_naive(model, *batch, PROBE)
        assert (expected - uncapped).abs().max() > 0.1
        torch.testing.assert_close(exit_entropy(model, *batch, PROBE), expected, atol=1e-5, rtol=0)


def test_scaled_logits_are_measured_as_the_model_computes_them():
    config = transformers.GraniteConfig(**SMALL, num_key_value_heads=2, intermediate_size=64, logits_scaling=0.2)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    batch = make_batch(*LENGTHS)
    torch.testing.assert_close(
        exit_entropy(model, *batch, PROBE), exit_entropy_naive(model, *batch, PROBE), atol=1e-5, rtol=0
    )
    del model.config.logits_scaling
    model.lm_head.register_forward_hook(lambda layer, args, output: output * 2)
    model.config.logits_scaling = 0.2
    with pytest.raises(ValueError, match="changes its logits after the output layer"):
        exit_entropy(model, *batch, PROBE)


def test_completions_of_one_prompt_push_it_through_the_model_once(models):
    tokens = []
    handle = models["qwen2"].register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    input_ids, attention_mask, response_mask = make_batch([9, 9, 9], [5, 3, 0])
    input_ids[:, :9] = input_ids[0, :9].clone()
    exit_entropy(models["qwen2"], input_ids, attention_mask, response_mask, PROBE)
    handle.remove()
    # One prompt, the responses, and a probe for each of their 6 + 4 + 1 positions: no padding.
    assert tokens == [9 + 5 + 3 + 11 * len(PROBE)]


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


def test_interpolation_by_hand():
    values, positions = [4.0, 2.0, 3.0], [0, 2, 6]
    expected = [4.0, 3.0, 2.0, 2.25, 2.5, 2.75, 3.0, 3.0, 3.0]
    assert interpolate(torch.tensor(values), torch.tensor(positions), 8).tolist() == expected
    assert [interpolated(values, positions, t) for t in range(9)] == expected
    assert interpolate(torch.tensor([1.5]), torch.tensor([0]), 2).tolist() == [1.5, 1.5, 1.5]
    assert [interpolated([1.5], [0], t) for t in range(3)] == [1.5, 1.5, 1.5]


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_error_is_that_of_the_weights_not_of_the_logits(device):
    """Same bf16 hidden states: fp32 logits and entropies agree with fp64 to 1e-4 nats, bf16 logits don't."""
    model = make_model("qwen2").to(device, torch.bfloat16)
    layer, hidden = model.get_output_embeddings(), []
    handle = layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0]))
    batch = [x.to(device) for x in make_batch([5], [1])]
    result = exit_entropy(model, *batch, PROBE, chunk_size=8)
    handle.remove()
    assert result.dtype == torch.float32
    exact = entropy_fp64(hidden[-1].double() @ layer.weight.double().T)
    rounded = entropy_fp64((hidden[-1] @ layer.weight.T).double())
    assert (result[0] - exact).abs().max() < 1e-4
    assert (rounded - exact).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-5), (torch.bfloat16, 0.3)])
def test_other_types_are_served_by_kernels_and_by_the_naive_attention(family, dtype, error):
    """Gemma 2 in eager mode caps its scores, which no kernel does."""
    model = make_model(family).to(dtype)
    model.set_attn_implementation("eager")
    batch = make_batch(*LENGTHS)
    for options in ({}, dict(stride=3), dict(max_tokens=20)):
        result, expected = (f(model, *batch, PROBE, **options) for f in (exit_entropy, exit_entropy_naive))
        torch.testing.assert_close(result, expected, atol=error, rtol=0)


def test_bf16_serves_sequences_whose_length_it_cannot_count():
    model = make_model("qwen2").to(torch.bfloat16)
    batch = make_batch([250], [10])  # 259, the last place, is 260 in bf16
    torch.testing.assert_close(
        exit_entropy(model, *batch, PROBE), exit_entropy_naive(model, *batch, PROBE), atol=0.3, rtol=0
    )


def entropy_fp64(logits):
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def test_tokens_per_forward_suit_the_device_and_the_memory_budget(models):
    half_billion, seven_billion = (
        transformers.Qwen2Config(
            hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=keys,
        )
        for hidden, wide, layers, heads, keys in ((896, 4864, 24, 14, 2), (3584, 18944, 28, 28, 4))
    )  # fmt: skip
    assert default_max_tokens(half_billion, "cpu") == 768
    assert default_max_tokens(half_billion, torch.device("cuda", 1)) == default_max_tokens(half_billion, 0) == 16384
    # 4 (4 * 3584 + 3 * 18944 + 8 * 28 * 128 + 2 * 28 * 4 * 128) bytes per token
    assert default_max_tokens(seven_billion, "cuda:0") == 2 * 2**30 // 514_048 == 4177
    for model in models.values():
        assert default_max_tokens(model.config, "cpu") == 768


def test_entropy_by_hand():
    assert entropy(torch.zeros(4)).item() == pytest.approx(math.log(4))
    assert entropy(torch.tensor([0.0, -math.inf])).item() == 0.0
    two_to_one = torch.tensor([math.log(2), 0.0])
    assert entropy(two_to_one).item() == pytest.approx(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))


@pytest.mark.parametrize("offset", [0.0, 20.0, -100.0])
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("vocabulary", [49_152, 151_936])  # SmolLM2's, Qwen2.5's
def test_entropy_over_a_large_vocabulary_agrees_with_float64(vocabulary, scale, offset):
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0)) * scale + offset
    logs = logits.double().log_softmax(-1)
    expected = -(logs.exp() * logs).sum(-1)
    targets = torch.tensor([0, 5, vocabulary - 1, 9])
    measured, log_prob = entropy_and_log_prob(lambda words: logits[:, words], 4, vocabulary, targets)
    torch.testing.assert_close(entropy(logits).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(measured.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_prob.double(), logs.gather(1, targets[:, None])[:, 0], atol=1e-5, rtol=0)


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
        (dict(max_tokens=0), "max_tokens: 0"),
        (dict(boundaries=torch.ones(2, 5)), "boundaries: shape"),
        (dict(answers=[torch.tensor([1])]), "answers: 1 of them for 2"),
        (dict(answers=[torch.tensor([1]), torch.tensor([VOCAB])]), "answers: .*97.* of 0 to 96"),
        (dict(response_mask=torch.ones(2, 99)), "response_mask: shape"),
        (dict(response_mask=torch.ones(2, 6)), "response_mask: row 1 is 1 where attention_mask is 0; set it to 0.$"),
        (dict(attention_mask=torch.ones(2, 3)), "attention_mask: shape"),
        (dict(attention_mask=torch.zeros(2, 10)), "attention_mask: the prompt of row 0 has no token; give it"),
        (
            dict(attention_mask=torch.tensor([[1] * 10, [1, 0, 1, 1] + [1] * 6])),
            "attention_mask: .* row 1 must be left-",
        ),
        (dict(attention_mask=torch.tensor([[1] * 7 + [0, 1, 1], [1] * 10])), "response of row 0 must be right-padded"),
        (dict(input_ids=torch.arange(10)), "input_ids: shape .10,. must be"),
        (dict(input_ids=torch.full((2, 10), VOCAB)), f"input_ids: {VOCAB} must be one of the model's 0 to {VOCAB - 1}"),
        (dict(response_mask=torch.full((2, 6), 0.5)), "response_mask: holds 0.5; it must be 0 or 1"),
        (dict(response_mask=torch.full((2, 6), 2)), "response_mask: holds 2; it must be 0 or 1"),
    ],
)
@pytest.mark.parametrize("function", [exit_entropy, exit_entropy_naive], ids=["pass", "naive"])
def test_bad_input_names_the_argument(models, function, change, message):
    input_ids, attention_mask, response_mask = make_batch([4, 2], [6, 3])
    arguments = dict(
        input_ids=input_ids, attention_mask=attention_mask, response_mask=response_mask, probe_ids=PROBE, chunk_size=4
    )
    with pytest.raises(ValueError, match=message):
        function(models["qwen2"], **(arguments | change))


def test_the_reference_has_the_arguments_of_the_pass():
    ours, naive = (inspect.signature(function).parameters for function in (exit_entropy, exit_entropy_naive))
    assert list(ours) == list(naive) and naive["measure"].default is exit_entropies_naive


def test_training_mode_is_refused():
    model = make_model("qwen2").train()
    with pytest.raises(ValueError, match=r"model\.eval"):
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
        (transformers.BertConfig(**SMALL, intermediate_size=64, is_decoder=False), "not causal"),
        (transformers.RobertaConfig(**SMALL, intermediate_size=64, is_decoder=True), "padding index"),
    ],
    ids=[
        "mistral-window",
        "qwen2-window",
        "gpt2-short",
        "bloom-alibi",
        "mamba",
        "llama-dynamic-rope",
        "bert",
        "roberta",
    ],
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


@pytest.mark.parametrize("method", ["PrefixTuning", "PromptTuning", "PromptEncoder"])
def test_virtual_tokens_are_refused_before_the_first_forward(method):
    peft = pytest.importorskip("peft")
    config = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(make_model("qwen2"), config).eval()
    model.base_model.register_forward_pre_hook(lambda *_: pytest.fail("a forward before the check"))
    with pytest.raises(ValueError, match=r"PEFT's P.*tokens or keys of its own"):
        exit_entropy(model, *make_batch([4], [9]), PROBE)


def test_an_adapter_on_the_output_layer_is_measured():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    lora = peft.get_peft_model(make_model("qwen2", tie_word_embeddings=False), config).eval()
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch(*LENGTHS)
    expected = exit_entropy_naive(lora, *batch, PROBE)
    assert (expected - exit_entropy_naive(make_model("qwen2"), *batch, PROBE)).abs().max() > 0.01
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_layer, "ROWS_AT_A_TIME", 5)
        result = exit_entropy(lora, *batch, PROBE)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_the_model_is_left_as_it_was_also_after_a_failure(models):
    model = models["qwen2"]
    before = model.config._attn_implementation, model.lm_head.forward
    ids = torch.tensor([[1, 2, 3]])
    logits = model(ids).logits
    exit_entropy(model, *make_batch([2], [3]), PROBE)
    for module in (model.model.layers[1], model.model.norm):
        handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            exit_entropy(model, *make_batch([2], [3]), PROBE)
        handle.remove()
    assert (model.config._attn_implementation, model.lm_head.forward) == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(ids).logits, logits)


def rows_through(model, module, run):
    """How many tokens each call of a module saw."""
    seen = []
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[-2]))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("score_answers", [False, True])
def test_the_last_layer_works_for_scored_tokens_only(models, score_answers):
    model, probe = models["llama"], [5, 6, 7]
    prompt, response = torch.arange(10), torch.arange(20)
    answer = torch.tensor([8, 9, 10, 11]) if score_answers else None
    completions = [packing.Completion(prompt, response, packing.probe_positions(20), answer)]

    def rows(layer, max_tokens):
        return rows_through(model, layer, lambda: exit_entropies(model, completions, probe, max_tokens=max_tokens))

    first, last = model.model.layers
    probe_tokens, scored = (21 * 6, 21 * 4) if score_answers else (21 * 3, 21)
    assert rows(first.mlp.down_proj, 1000) == [30 + probe_tokens]
    assert rows(last.mlp.down_proj, 1000) == [scored]
    assert rows(last.self_attn.k_proj, 1000) == [30 + probe_tokens]
    alone, *others = rows(first.mlp.down_proj, 31)  # no room for a probe in the trajectory's forward
    assert alone == 30 and sum(others) == probe_tokens
    alone, *others = rows(last.mlp.down_proj, 31)
    assert alone == 1 and sum(others) == scored  # one trajectory token, whose output nobody reads


class Gated(torch.nn.Module):
    """Has linear layers, but also mixes neighbouring tokens by a parameter of its own."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.mix = mlp, torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.mlp(x + self.mix * x.roll(1, dims=1))


class Routed(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x), "router logits"


def test_only_tokenwise_modules_are_limited():
    layer = make_model("llama").model.layers[1]

    def siblings():
        return module_forward.tokenwise_siblings(layer, layer.self_attn)

    mlp = layer.mlp
    assert siblings() == [mlp]
    layer.mlp = Gated(mlp)
    assert siblings() == []
    layer.mlp = Routed(mlp)
    assert siblings() == [layer.mlp]
    assert module_forward.tokenwise_siblings(mlp, layer.self_attn) == []  # an attention that no layer holds directly

    rows, x = torch.tensor([1, 3]), torch.randn(1, 5, 32)
    expected = mlp(x)
    result = module_forward.limited_to(rows, 5, mlp.forward)(x)
    torch.testing.assert_close(result[:, rows], expected[:, rows])
    assert (result[:, [0, 2, 4]] == 0).all()
    for unchanged in (
        module_forward.limited_to(rows, 4, mlp.forward)(x),
        module_forward.limited_to(rows, 5, mlp.forward)(x[0])[None],
    ):
        assert torch.equal(unchanged, expected)
    whole, _ = module_forward.limited_to(rows, 5, layer.mlp.forward)(x)
    assert torch.equal(whole, expected)


def test_a_layer_with_an_attention_of_its_own_is_refused(models):
    model = make_model("llama")
    model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ValueError, match=r"1 of the 2 layers of LlamaForCausalLM .* all or none to; use another"):
        exit_entropy(model, *make_batch([2], [3]), PROBE)


def test_masks_and_keys_that_only_the_model_knows_are_refused():
    """Doge masks keys inside its attention."""
    config = transformers.DogeConfig(**SMALL, num_key_value_heads=2, intermediate_size=64, keep_window_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"DogeAttention makes masks or keys of its own.*; use another"):
        exit_entropy(model, *make_batch([4], [9]), PROBE)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_passes_the_comparison_with_plain_forwards(models, family):
    assert check_exactness(models[family], PROBE) < 1e-5
    assert 1e-5 < check_exactness(make_model(family).to(torch.bfloat16), PROBE) < 0.1  # its logits round
    assert check_exactness(make_model(family).to(torch.bfloat16).float(), PROBE) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_tokens_by_a_way_of_its_own_is_refused(dtype):
    """Neither its config nor its modules show it."""

    class Mixing(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x) + 4 * x.cumsum(1)

    model = make_model("qwen2")
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match=r"on a random text .* Qwen2ForCausalLM differ by .* so it can't be served"):
        check_exactness(model.to(dtype), PROBE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("score_answers", [False, True])
def test_the_model_s_own_attention_with_a_mask_gives_the_same(models, monkeypatch, implementation, score_answers):
    """The fallback for models whose attention can't be replaced, forced on a model whose attention can be."""
    model = make_model("qwen2")
    model.set_attn_implementation(implementation)
    batch = make_batch([3, 9, 9, 6], [13, 0, 5, 20])
    answers = [torch.tensor(a, dtype=torch.long) for a in ([1, 2], [3], [4, 5, 6], [])] if score_answers else None
    expected = exit_entropy_naive(models["qwen2"], *batch, PROBE, answers=answers)
    used = []

    class Watched(attention.MaskedAttention):
        def forward(self, *arguments, **options):
            used.append(1)
            return super().forward(*arguments, **options)

    monkeypatch.setattr(model, "_can_set_attn_implementation", lambda: False)
    monkeypatch.setattr(attention, "MaskedAttention", Watched)
    for max_tokens in (30, None):
        result = exit_entropy(model, *batch, PROBE, answers=answers, max_tokens=max_tokens)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-6)
    assert used


def test_a_model_with_an_attention_of_its_own_is_served():
    """GPT-J doesn't use the attention interface, so it gets a mask and a cache."""
    config = transformers.GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch(*LENGTHS)
    expected = exit_entropy_naive(model, *batch, PROBE)
    assert expected.std() > 0.05
    torch.testing.assert_close(exit_entropy(model, *batch, PROBE), expected, atol=1e-5, rtol=0)


def test_ragged_completions_are_checked_before_the_first_forward(models):
    def row(prompt, answer=None):
        return packing.Completion(
            torch.tensor(prompt, dtype=torch.long), torch.tensor([3]), torch.tensor([0, 1]), answer
        )

    with pytest.raises(ValueError, match="probe_ids: \\[\\] has no token; pass at least one"):
        exit_entropies(models["qwen2"], [row([1])], [])
    for rows, message in (
        ([row([1]), row([])], "completions: the prompt of number 1 has no token; give it at least one"),
        ([row([1]), row([1], torch.tensor([2]))], "completions: 1 of 2 have an answer to score; give one to all"),
    ):
        with pytest.raises(ValueError, match=message):
            exit_entropies(models["qwen2"], rows, PROBE)
    with pytest.raises(ValueError, match=r"model\.eval"):
        exit_entropies(make_model("qwen2").train(), [row([1])], PROBE)
    config = CONFIGS["mistral"]()
    config.sliding_window = 4
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="sliding window of 4 tokens"):
        exit_entropies(model, [row([1, 2, 3])], PROBE)


def packed_forward(model, rows):
    """One forward of whole sequences without padding, as trainers make for log-probs, and where they start."""
    sequences = [torch.cat([row.prompt, row.response]) for row in rows]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat(sequences)[None],
            attention_mask=None,
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            use_cache=False,
        ).logits
    return logits, (lengths.cumsum(0) - lengths).tolist()


def random_rows(score_answers):
    """Five rows: two share a prompt, and three responses are longer than their last position."""
    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(0, VOCAB, (n,), generator=generator)

    shared = ids(5)
    prompts = shared, ids(3), ids(9), shared, ids(1)
    positions = (
        packing.probe_positions(13, 3),
        packing.probe_positions(6),
        packing.probe_positions(0),
        packing.probe_positions(9, boundaries=torch.tensor([0, 1, 0, 0, 0, 0, 0, 1, 0]), max_gap=3),
        packing.probe_positions(7),
    )
    answers = [torch.tensor(a, dtype=torch.long) for a in ([1, 2], [3], [4], [5, 6, 7], [])]
    return [
        packing.Completion(prompt, ids(n), places, answer if score_answers else None)
        for prompt, n, places, answer in zip(prompts, (13, 9, 2, 9, 11), positions, answers, strict=True)
    ]


@pytest.mark.parametrize("score_answers", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_keys_of_the_caller_s_forward_serve_and_the_forward_is_unchanged(models, family, score_answers):
    model, rows, probe = models[family], random_rows(score_answers), torch.tensor(PROBE)
    name = model.config._attn_implementation
    function, layer_forward = attention.ALL_ATTENTION_FUNCTIONS[name], model.get_output_embeddings().forward
    expected_logits, _ = packed_forward(model, rows)
    with forward_to_share(model) as keys_and_values:
        logits, starts = packed_forward(model, rows)
    assert torch.equal(logits, expected_logits)
    assert model.config._attn_implementation == name and model.get_output_embeddings().forward == layer_forward
    assert attention.ALL_ATTENTION_FUNCTIONS[name] is function and not model._forward_hooks
    probes = packing.probe_forwards(rows, packing.slots_of_sequences(rows, starts), probe, max_tokens=50)
    result = exit_entropies_after(model, rows, probes, keys_and_values)
    expected = exit_entropies_naive(model, rows, PROBE)
    assert [len(h) for h in expected] == [len(row.response) + 1 for row in rows]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-6)


@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 15), st.integers(1, 5)), min_size=1, max_size=4),
    probe_length=st.integers(1, 4),
    max_tokens=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_shared_and_masked_forwards_equal_the_pass_at_random_shapes(models, rows, probe_length, max_tokens, seed):
    model, generator = models["llama"], torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, VOCAB, (n,), generator=generator) for row in rows for n in row[:2]]
    completions = [
        packing.Completion(prompt, response, packing.probe_positions(len(response), stride))
        for prompt, response, (_, _, stride) in zip(ids[::2], ids[1::2], rows, strict=True)
    ]
    probe = torch.randint(0, VOCAB, (probe_length,), generator=generator)
    expected = exit_entropies(model, completions, probe, max_tokens=max_tokens)

    with forward_to_share(model) as keys_and_values:
        _, starts = packed_forward(model, completions)
    slots = packing.slots_of_sequences(completions, starts)
    probes = packing.probe_forwards(completions, slots, probe, max_tokens)
    torch.testing.assert_close(
        exit_entropies_after(model, completions, probes, keys_and_values), expected, atol=1e-5, rtol=1e-6
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_can_set_attn_implementation", lambda: False)
        masked = exit_entropies(model, completions, probe, max_tokens=max_tokens)
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-6)


def test_what_can_t_be_captured_is_known(models, monkeypatch):
    assert all(attention.can_capture(model) for model in models.values())
    model = make_model("qwen2")
    model.set_attn_implementation("eager")
    assert not attention.can_capture(model)
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(model, "_can_set_attn_implementation", lambda: False)
    assert not attention.can_capture(model)


def test_a_shared_forward_that_fails_or_changes_its_logits_leaves_the_model_as_it_was(models):
    model, rows = make_model("qwen2"), random_rows(False)
    function = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
    handle = model.lm_head.register_forward_hook(lambda layer, args, output: output * 2)
    with pytest.raises(ValueError, match="changes its logits after the output layer"), forward_to_share(model):
        packed_forward(model, rows)
    handle.remove()
    assert attention.ALL_ATTENTION_FUNCTIONS["sdpa"] is function
    assert torch.equal(packed_forward(model, rows)[0], packed_forward(models["qwen2"], rows)[0])
