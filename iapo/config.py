"""The `iapo` section of the configuration: defaults and validation. Imports nothing heavy.

The defaults are only here: `iapo.launch.compose` puts them into every configuration.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from iapo.answer_format import FORMATS

FORMAT = FORMATS["tags"]
CHOICES = {
    "gate": ("all", "correct"),
    "region": ("reasoning", "response"),
    "format": tuple(FORMATS),
    "score": ("first_token_entropy", "answer_logprob", "reference_answer", "next_token_entropy"),
    "probe_at": ("stride", "boundaries", "ends"),
    "probe_tokens": ("ids", "natural"),
    "exploration": ("paper", "unpraised"),
    "progress_form": ("to_go", "fitted"),
    "progress_value": ("measured", "shuffled", "none"),
}


@dataclass(frozen=True)
class IapoConfig:
    """Weights of the advantage's terms and how the exit entropies are measured.

    Attributes:
        outcome: weight of GRPO's outcome advantage (>= 0). 0 where another term holds the outcome already.
        alpha: weight of the informativeness term (paper, >= 0).
        beta: weight of the exploration adjustment (paper, >= 0).
        rho: weight of the information-rate term (ours, >= 0).
        progress: weight of the progress-to-go term (ours, >= 0). It reads v_t = exp(-h_t), the probability of the right
            answer if the model answered after t tokens, so `score` must be "reference_answer".
        progress_form: "to_go", the progress that is still to come, beside the outcome; or "fitted", the outcome itself
            less a baseline that is fitted to v, which takes the place of GRPO's (`outcome` 0).
        gamma: discount of progress per token, in (0, 1]. 1: a token is credited with all that is still gained after
            it; 0.95: mostly with what the next 20 tokens gain.
        price: what a token of reasoning costs, in right answers: at 0.001 it costs a thousandth of one.
        progress_value: "measured": v is the completion's own. The other two are falsifiers, to see whether v matters:
            "shuffled" gives it the v of another completion of its prompt, "none" a v of 0.
        exploration: "paper", or "unpraised": no token of a wrong completion gains by the exploration adjustment.
        gate: completions that get the informativeness term: "all" (paper) or "correct".
        region: tokens that are probed. "reasoning": those before the first `exit_marker` in the completion, because a
            probe after it is off-distribution. "response": all of them (paper).
        format: how completions are laid out: "tags" (paper), "boxed" or "boxed_no_think", see `iapo.answer_format`.
            `format=...` on the command line sets it with the markers and the probe, which can be set alone too.
        exit_marker: text that ends the reasoning.
        probe: text of the exit probe, appended to a prefix to make the model answer now.
        probe_tokens: "ids": the probe's own tokens after any prefix. "natural": where the tokenizer would write the
            last token of the prefix and the probe with other tokens, those take their place.
        score: what is measured after the probe. "first_token_entropy": the entropy of the next token (paper).
            "answer_logprob": -log p of the completion's own final answer, all its tokens (pointwise information).
            "reference_answer": -log p of the data's right answer and of `answer_end` after it, all their tokens; of
            several right answers the most probable one. On the command line "auto" is this, or
            "first_token_entropy" for the embedded models.
            "next_token_entropy": nothing; the policy's entropy at each token itself takes its place (the paper's
            ablation, for alpha alone). It needs no probe pass; `validation_information` still makes its own.
        answer_end: text that ends the answer, for `score` "answer_logprob" and "reference_answer".
        probe_at: "stride", every `stride`-th position, "boundaries", where a reasoning step ends, or "ends", before
            the first token and after the last. The tokens between two probes share the gain equally. Where no term
            reads gains (alpha and progress are 0), training probes the ends alone, see `in_training`.
        stride: 1 probes every position (paper).
        max_gap: with "boundaries": at most this many tokens between two probes.
        max_tokens_per_micro_batch: tokens per forward of the pass; None: what suits the device. Speed and memory only.
        share_log_prob_forward: let the probes read the keys and values of verl's forwards for old log-probs, if verl
            makes them, instead of another forward of the trajectories. Speed only.
        validation_information: measure the information rate on validation completions too (one more pass each time).

    Raises:
        ValueError: naming the field, its value and the fix.
    """

    outcome: float = 1.0
    alpha: float = 0.0
    beta: float = 0.0
    rho: float = 0.0
    progress: float = 0.0
    progress_form: str = "to_go"
    gamma: float = 1.0
    price: float = 0.0
    progress_value: str = "measured"
    exploration: str = "paper"
    gate: str = "all"
    region: str = "reasoning"
    format: str = FORMAT.name
    exit_marker: str = FORMAT.exit_marker
    probe: str = FORMAT.probe
    probe_tokens: str = "ids"
    score: str = "first_token_entropy"
    answer_end: str = FORMAT.answer_end
    probe_at: str = "stride"
    stride: int = 1
    max_gap: int = 64
    max_tokens_per_micro_batch: int | None = None
    share_log_prob_forward: bool = True
    validation_information: bool = False

    def __post_init__(self) -> None:
        for name in ("outcome", "alpha", "beta", "rho", "progress", "price"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"iapo.{name}: {value!r} must be a number >= 0.")
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float) or not 0 < self.gamma <= 1:
            raise ValueError(f"iapo.gamma: {self.gamma!r} must be a number above 0 and at most 1.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                more = ", or auto" if name == "score" else ""  # which is resolved before
                raise ValueError(f"iapo.{name}: {getattr(self, name)!r} must be one of {', '.join(choices)}{more}.")
        for name in ("stride", "max_gap", "max_tokens_per_micro_batch"):
            value = getattr(self, name)
            if value is None and name == "max_tokens_per_micro_batch":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"iapo.{name}: {value!r} must be an integer of at least 1.")
        for name in ("exit_marker", "probe", "answer_end"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"iapo.{name}: {value!r} must be a non-empty text.")
        if self.score == "next_token_entropy" and self.rho > 0:
            raise ValueError(
                f"iapo.score: 'next_token_entropy' says nothing about the answer, so there is no information rate for "
                f"iapo.rho={self.rho}; set iapo.rho=0 or choose another score."
            )
        read_by = {"progress": ("progress_form", "gamma", "price", "progress_value"), "beta": ("exploration",)}
        for weight, names in read_by.items():
            for name in names:
                value, default = getattr(self, name), getattr(type(self), name)
                if getattr(self, weight) == 0 and value != default:
                    raise ValueError(
                        f"iapo.{name}: {value!r} has no effect with iapo.{weight}=0; leave it {default!r}."
                    )
        if self.progress_form == "fitted" and self.gamma != 1:
            raise ValueError(f"iapo.gamma: {self.gamma!r} has no effect with iapo.progress_form=fitted; leave it 1.0.")
        if self.outcome == self.alpha == self.beta == self.rho == self.progress == 0:
            raise ValueError("iapo.outcome: 0 leaves no term to train with; set it to 1 or give another term a weight.")
        if self.progress > 0 and self.score != "reference_answer":
            raise ValueError(
                f"iapo.score: {self.score!r} is no surprisal of the right answer, which iapo.progress={self.progress} "
                "needs; set iapo.score=reference_answer or iapo.progress=0."
            )
        if self.probe_at == "ends" and self.needs_gains and self.score != "next_token_entropy":
            weight = f"alpha={self.alpha}" if self.alpha > 0 else f"progress={self.progress}"
            raise ValueError(
                f"iapo.probe_at: 'ends' measures no token's gain, which iapo.{weight} needs; choose stride or "
                "boundaries."
            )
        for name in ("share_log_prob_forward", "validation_information"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"iapo.{name}: {getattr(self, name)!r} must be true or false.")

    @property
    def needs_exit_entropy(self) -> bool:
        """Whether a term of the advantage needs the probe pass."""
        return (self.needs_gains or self.rho > 0) and self.score != "next_token_entropy"

    @property
    def needs_gains(self) -> bool:
        """Whether a term reads h at each token, and not at the ends of the reasoning alone."""
        return self.alpha > 0 or self.progress > 0

    @property
    def probes(self) -> bool:
        """Whether anything needs the probe pass: a term, or the metric of validation completions."""
        return self.needs_exit_entropy or self.validation_information

    @property
    def in_training(self) -> "IapoConfig":
        """What training measures: h_0 and h_T alone where that is all that a term reads (the information rate)."""
        return self if self.needs_gains else replace(self, probe_at="ends")

    @property
    def needs_references(self) -> bool:
        """Whether the probe pass scores the data's right answers."""
        return self.probes and self.score == "reference_answer"

    @property
    def needs_next_token_entropy(self) -> bool:
        """Whether a term of the advantage needs the entropies that verl computes with old log-probs."""
        return self.alpha > 0 and self.score == "next_token_entropy"

    @property
    def needs_correctness(self) -> bool:
        fitted = self.progress > 0 and self.progress_form == "fitted"
        return self.beta > 0 or self.rho > 0 or (self.alpha > 0 and self.gate == "correct") or fitted

    @property
    def is_grpo(self) -> bool:
        return self.outcome == 1 and self.alpha == self.beta == self.rho == self.progress == 0

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "IapoConfig":
        """From the `iapo` node of a configuration; unknown keys raise ValueError."""
        known = [field.name for field in fields(cls)]
        for key in mapping:
            if key not in known:
                raise ValueError(f"iapo.{key}: unknown key; known are {', '.join(known)}.")
        return cls(**dict(mapping))
