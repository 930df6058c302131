"""Length penalties on correct completions, in their common forms."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from iapo.methods.base import Batch, Method, check_choice, check_number


@dataclass
class LengthPenalty(Method):
    r"""A price on the length of correct completions; wrong ones keep their reward.

        r'_i = r_i + weight * f(L_i)      if completion i of L_i tokens is correct;  else r_i

    with one of these f, over the lengths L of the correct completions of the group of i:

        linear     0.5 - (L_i - min L) / (max L - min L)
        sigmoid    -sigmoid((L_i - mean L) / std L)
        cosine     (cos(pi L_i / max_length) - 1) / 2

    linear lies in [-0.5, 0.5], the other two in [-1, 0]. A fourth form prices tokens of right and wrong completions:

        raw        r'_i = r_i - weight * L_i / max_length

    Source: linear is the length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3), sigmoid that of Arora and
    Zanette (arXiv 2502.04463, section 3), cosine the branch for correct answers of Yeo et al. (arXiv 2502.03373,
    section 3.1) with rewards from r to r - weight. raw is a control of ours: nothing is normalised before GRPO does it.

    Degenerate cases: linear and sigmoid are 0 if all L are equal, and so for a single right answer. Beyond max_length
    cosine stays at -1. Where all rewards of a group are equal, the weight of raw cancels: GRPO divides by the standard
    deviation.

    Differences: Kimi takes min and max over all completions of the group and gives wrong ones min(0, f), which rewards
    short failures; here the correct ones are compared among themselves. No code of Kimi k1.5 was found. Arora and
    Zanette multiply the reward 1 by 1 - alpha * sigmoid(...), which is the same as adding it. Their released code adds
    1e-7 to std (the population's, as here), so equal lengths, or a single right answer, cost half the weight there and
    nothing here. The released code of Yeo et al. gives a fixed reward near the longest length; wrong answers gain with
    their length and lose by what they repeat.

    Attributes:
        form: "linear", "sigmoid", "cosine" or "raw".
        weight: the most that length can cost, where a right answer has a reward of 1.
        max_length: the longest response in tokens, for cosine and raw; the other forms don't read it.
    """

    form: str = "linear"
    weight: float = 0.5
    max_length: int = 1

    needs = ("correct",)

    def __post_init__(self) -> None:
        check_choice("form", self.form, ("linear", "sigmoid", "cosine", "raw"))
        check_number("weight", self.weight)
        check_number("max_length", self.max_length, low=1, whole=True)

    def problems(self, rollouts: int, max_response_length: int) -> Iterator[str]:
        if self.form in ("cosine", "raw") and self.max_length < max_response_length:
            yield (
                f"max_length: {self.max_length} is below data.max_response_length={max_response_length}; set it to the "
                "same, so that the longest response, and no other, costs the whole weight."
            )

    def shape_reward(self, batch: Batch) -> torch.Tensor:
        if self.form == "raw":
            return batch.rewards - self.weight * batch.lengths / self.max_length
        rewards_B, correct_B = batch.rewards.clone(), batch.needed("correct")
        for rows in batch.groups():
            rows = rows[correct_B[rows]]
            if len(rows):
                rewards_B[rows] += self.weight * self._price(batch.lengths[rows])
        return rewards_B

    def _price(self, lengths: torch.Tensor) -> torch.Tensor:
        if self.form == "cosine":
            return ((math.pi * (lengths / self.max_length).clamp(max=1)).cos() - 1) / 2
        if lengths.min() == lengths.max():
            return torch.zeros_like(lengths)
        if self.form == "linear":
            return 0.5 - (lengths - lengths.min()) / (lengths.max() - lengths.min())
        return -((lengths - lengths.mean()) / lengths.std(correction=0)).sigmoid()
