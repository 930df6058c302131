"""From last hidden states to entropies and log-probabilities, with few float32 logits in memory at a time.

bf16 logits alone move an entropy over a 152k vocabulary by hundredths of a nat, which is as much as most tokens gain.
Float32 logits of all tokens fill a GPU. So the output layer is applied in float32 to one slice of the vocabulary at a
time, with running sums:

    m = max_v z_v,   s = sum_v exp(z_v - m),   w = sum_v exp(z_v - m) (z_v - m)
    logsumexp(z) = m + log s,     H = log s - w / s

Shape suffixes: N rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from iapo.probe.module_forward import replaced_forward
from iapo.probe.supported_models import USE_ANOTHER, CausalLM

# Float32 numbers in one slice of the logits or of the weight (64 MB). About four such tensors exist at once.
NUMBERS_AT_A_TIME = 2**24
# Rows at a time through an output layer whose weight can't be sliced.
ROWS_AT_A_TIME = 64


def entropy_and_log_prob(
    logits: Callable[[slice], torch.Tensor],
    rows: int,
    vocabulary: int,
    targets: torch.Tensor | None = None,
    size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Entropies (N,) and, if there are targets (N,), their log-probabilities (N,); float32, nats.

    Args:
        logits: slice of the vocabulary -> its z (N, words), float32. A logit of -inf has probability 0.
        rows: N.
        size: numbers per word that `logits` itself holds, e.g. D of its weight.
    """
    words = max(NUMBERS_AT_A_TIME // max(rows, size), 1)
    words -= words % 64 if words > 64 else 0  # kernels are faster with multiples of 64
    maximum: torch.Tensor | None = None
    for start in range(0, vocabulary, words):
        z = logits(slice(start, min(start + words, vocabulary)))
        highest = z.amax(1).clamp(min=torch.finfo(z.dtype).min)
        if maximum is None:
            maximum, total, weighted = highest, torch.zeros_like(highest), torch.zeros_like(highest)
            target_logit = torch.zeros_like(highest)
        if targets is not None:
            inside = (targets >= start) & (targets < start + z.shape[1])
            column = torch.where(inside, targets - start, 0)
            target_logit = torch.where(inside, z.gather(1, column[:, None])[:, 0], target_logit)
        # Rescale the sums so far to the new maximum.
        shift = maximum - torch.maximum(maximum, highest)
        maximum = maximum - shift
        weighted = (weighted + total * shift) * shift.exp()
        total = total * shift.exp()
        z = (z - maximum[:, None]).clamp_(min=-1e30)  # finite, because 0 * -inf below would be NaN
        probability = z.exp()
        total += probability.sum(1)
        weighted += probability.mul_(z).sum(1)
    assert maximum is not None, "the vocabulary is not empty"
    log_prob = None if targets is None else target_logit - maximum - total.log()
    return total.log() - weighted / total, log_prob


class MeasuredOutputLayer:
    """Replaces the forward of a model's output layer.

    Attributes:
        entropy, log_prob: (N,) of the last forward's rows, float32 in nats; log_prob is that of the targets.
    """

    def __init__(self, layer: torch.nn.Module, after: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.layer, self.original, self.after = layer, layer.forward, after
        self.targets: torch.Tensor | None = None
        self.measures = False
        self.entropy: torch.Tensor | None = None
        self.log_prob: torch.Tensor | None = None
        self.raw: torch.Tensor | None = None

    def start(self, targets: torch.Tensor | None, measures: bool) -> None:
        """Call this before a forward.

        Args:
            targets: (N,) the tokens whose log-probabilities to measure; None: measure entropies only.
            measures: False returns the layer's own logits, bit for bit, and measures nothing.
        """
        self.targets, self.measures = targets, measures

    def check(self, model: CausalLM, logits: torch.Tensor) -> None:
        """Call this after a forward: it refuses a model that changes its logits in an unknown way.

        Raises:
            ValueError: the logits that the model returned are not `after` of the layer's output.
        """
        assert self.raw is not None, "the output layer was called"
        expected, returned = self.after(self.raw.float()), logits[..., -1, :].float()
        if not torch.allclose(expected, returned, rtol=2e-2, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"model: {type(model).__name__} changes its logits after the output layer in an unknown way, so their "
                f"entropy can't be measured in float32 slices; {USE_ANOTHER}"
            )

    @property
    def scores(self) -> torch.Tensor:
        """(N,) of the last forward's rows: the surprisals of the targets if it had some, otherwise the entropies."""
        assert self.entropy is not None, "the last forward measured"
        return self.entropy if self.log_prob is None else -self.log_prob

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.measures:
            with torch.autocast(hidden.device.type, enabled=False):
                self.entropy, self.log_prob = self._measure(hidden.flatten(0, -2))
            hidden = hidden[..., -1:, :]  # nobody reads the others' logits
        logits = self.original(hidden)
        self.raw = logits[..., -1, :].clone()  # the last token's, before the model changes them
        return logits

    def _measure(self, hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer, rows = self.layer, len(hidden_ND)
        targets = None if self.targets is None else self.targets.to(hidden_ND.device)
        if isinstance(layer, torch.nn.Linear):
            # A GPU multiplies half-precision numbers exactly and sums in float32, many times faster than float32 ones.
            plain = type(layer.weight) in (torch.Tensor, torch.nn.Parameter) and torch.version.hip is None
            half = plain and hidden_ND.is_cuda and hidden_ND.dtype == layer.weight.dtype != torch.float32
            states = hidden_ND if half else hidden_ND.float()

            def logits(words: slice) -> torch.Tensor:
                bias = None if layer.bias is None else layer.bias[words].float()
                if not half:
                    return self.after(F.linear(states, layer.weight[words].float(), bias))
                z = torch.mm(states, layer.weight[words].T, out_dtype=torch.float32)
                return self.after(z if bias is None else z + bias)

            return entropy_and_log_prob(logits, rows, len(layer.weight), targets, layer.weight.shape[1])
        results = []  # an adapter or a quantised layer: only its own forward knows its logits
        for some in torch.arange(rows).split(ROWS_AT_A_TIME):
            z = self.after(self.original(hidden_ND[some]).float())
            own_targets = None if targets is None else targets[some]
            results.append(entropy_and_log_prob(partial(columns, z), len(z), z.shape[1], own_targets))
        entropies, log_probs = zip(*results, strict=True)
        return torch.cat(entropies), None if targets is None else torch.cat(log_probs)


def columns(z: torch.Tensor, words: slice) -> torch.Tensor:
    return z[:, words]


@contextmanager
def measured_output_layer(model: CausalLM) -> Iterator[MeasuredOutputLayer]:
    """Let the output layer measure instead of returning all logits; its own forward is restored at the end.

    It works for FSDP models too, because the layer holds its whole weight during the model's forward.

    Raises:
        ValueError: FSDP1 gathers parts of the output layer, those of an adapter, separately.
    """
    layer = model.get_output_embeddings()
    layer = getattr(layer, "_fsdp_wrapped_module", layer)  # inside its FSDP1 unit, which gathers once per forward
    if any(hasattr(module, "_fsdp_wrapped_module") for module in layer.modules()):
        raise ValueError(
            f"model: the output layer of {type(model).__name__} has FSDP1 units inside, an adapter's, which ranks with "
            "unequal work would gather unequally often; leave it out of actor_rollout_ref.model.target_modules."
        )
    measured = MeasuredOutputLayer(layer, _after_output_layer(model.config.get_text_config(decoder=True)))
    with replaced_forward(layer, measured):
        yield measured


def _after_output_layer(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the model does to the output layer's logits: Gemma caps them, Cohere and Granite scale them."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)

    def after(z: torch.Tensor) -> torch.Tensor:
        z = z if scale == 1 else z * scale
        return z if cap is None else cap * torch.tanh(z / cap)

    return after
