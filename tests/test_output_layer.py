import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iapo.probe import output_layer
from iapo.probe.output_layer import MeasuredOutputLayer, entropy_and_log_prob, measured_output_layer
from tests.conftest import DEVICES, make_model


def test_by_hand():
    z = torch.tensor([[math.log(2), 0.0, -math.inf], [5.0, 5.0, 5.0]])
    entropy, log_prob = entropy_and_log_prob(lambda words: z[:, words], 2, 3, torch.tensor([0, 2]))
    expected = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    torch.testing.assert_close(entropy, torch.tensor([expected, math.log(3)]))
    torch.testing.assert_close(log_prob, torch.tensor([math.log(2 / 3), math.log(1 / 3)]))
    assert entropy_and_log_prob(lambda words: z[:, words], 2, 3)[1] is None


@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 40),
    at_a_time=st.integers(1, 100),
    scale=st.sampled_from([0.0, 1.0, 100.0]),
    shift=st.sampled_from([0.0, -1e4, 1e4]),
    seed=st.integers(0, 100),
)
def test_slices_equal_log_softmax_in_float64(rows, vocabulary, at_a_time, scale, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocabulary, generator=generator) * scale + shift
    z[:, 1:] = z[:, 1:].masked_fill(torch.rand(rows, vocabulary - 1, generator=generator) < 0.2, -math.inf)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    logs = z.double().log_softmax(-1)
    expected = -torch.where(logs > -math.inf, logs.exp() * logs, 0.0).sum(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_layer, "NUMBERS_AT_A_TIME", at_a_time)
        entropy, log_prob = entropy_and_log_prob(lambda words: z[:, words], rows, vocabulary, targets)
    torch.testing.assert_close(entropy.double(), expected, atol=1e-5, rtol=1e-5)
    # At 1e4 float32 logits are 1e-3 apart, so a difference of two of them is no better.
    target_logs = logs.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_prob.double(), target_logs, atol=1e-5 if shift == 0 else 2e-3, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_over_a_large_vocabulary_agrees_with_float64(device, dtype):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 151_936, bias=True).to(device, dtype)
    hidden = (5 * torch.randn(1, 6, 64)).to(device, dtype)
    exact = (hidden[0].double() @ layer.weight.double().T + layer.bias.double()).log_softmax(-1)
    targets = torch.arange(6) * 1000
    measured = MeasuredOutputLayer(layer, lambda z: z)
    measured.start(targets, measures=True)
    measured(hidden)
    assert (measured.entropy + (exact.exp() * exact).sum(-1)).abs().max() < 1e-4
    expected = exact.gather(1, targets.to(device)[:, None])[:, 0]
    assert (measured.log_prob - expected).abs().max() < 1e-4


def test_fsdp1_units_inside_the_output_layer_are_refused():
    """FSDP1 makes a module the `_fsdp_wrapped_module` of another; the adapter here is imitated that way."""
    model = make_model("qwen2")

    def unit(module):
        wrapper = torch.nn.Module()
        wrapper._fsdp_wrapped_module = module
        return wrapper

    model.lm_head = unit(torch.nn.Sequential(unit(model.lm_head)))
    with (
        pytest.raises(ValueError, match=r"the output layer of Qwen2ForCausalLM has FSDP1 units inside.*; leave it out"),
        measured_output_layer(model),
    ):
        pass
