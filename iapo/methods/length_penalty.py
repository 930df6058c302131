"""Length penalties on correct completions, in their common forms."""

import math
from dataclasses import dataclass

import torch

from iapo.methods.base import Batch, Method, choice, number


@dataclass
class LengthPenalty(Method):
    r"""A price on the length of correct completions; wrong ones keep their reward.

        r'_i = r_i + weight * f(L_i)    if completion i of L_i tokens is correct

    with f, over the lengths L of the correct completions of i's group,

        linear    0.5 - (L_i - min L) / (max L - min L);  0 if all are equal
        sigmoid   -sigmoid((L_i - mean L) / std L);  0 if all are equal
        cosine    (cos(pi L_i / L_max) - 1) / 2

    linear is the length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3), sigmoid that of Arora and Zanette
    (arXiv 2502.04463, section 3), cosine the correct branch of Yeo et al. (arXiv 2502.03373, section 3.1) with
    rewards from r to r - weight. All lie in [-1, 0.5].

    Differences: Kimi takes min and max over all completions of the group and gives wrong ones min(0, f), which
    rewards short failures; here the correct ones are compared among each other. Arora and Zanette multiply the reward
    1 by 1 - alpha * sigmoid(...), the same as adding it. Their released code adds 1e-7 to std (the population's, as
    here), so equal lengths, or a single right answer, cost half the weight there and nothing here. The released code of
    Yeo et al. gives a fixed reward near L_max, and wrong answers gain with their length and lose by what they repeat.
    No code of Kimi k1.5's was found.

    Attributes:
        form: "linear", "sigmoid" or "cosine".
        weight: the most that length can cost, next to a reward of 1 for a right answer.
        max_length: L_max of the cosine, the longest response; any number for the others.
    """

    form: str = "linear"
    weight: float = 0.5
    max_length: int = 1

    needs = ("correct",)

    def __post_init__(self):
        choice("form", self.form, ("linear", "sigmoid", "cosine"))
        number("weight", self.weight)
        number("max_length", self.max_length, low=1, whole=True)

    def shape_reward(self, batch: Batch) -> torch.Tensor:
        rewards_B = batch.rewards.clone()
        for rows in batch.groups():
            rows = rows[batch.correct[rows]]
            if len(rows):
                rewards_B[rows] += self.weight * self._price(batch.lengths[rows])
        return rewards_B

    def _price(self, lengths: torch.Tensor) -> torch.Tensor:
        if self.form == "cosine":
            return ((math.pi * lengths / self.max_length).cos() - 1) / 2
        if lengths.min() == lengths.max():
            return torch.zeros_like(lengths)
        if self.form == "linear":
            return 0.5 - (lengths - lengths.min()) / (lengths.max() - lengths.min())
        return -((lengths - lengths.mean()) / lengths.std(correction=0)).sigmoid()
