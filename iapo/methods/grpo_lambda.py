"""GRPO-lambda: a price on length only where a prompt is mastered (Dai et al., arXiv 2505.18086)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from iapo.methods.base import Batch, Method, check_number
from iapo.methods.length_penalty import LengthPenalty


@dataclass
class GrpoLambda(Method):
    """The sigmoid length penalty in the most accurate groups of the batch; the others keep their rewards.

        r'_i = r_i - weight * sigmoid((L_i - mean L) / std L)      if i is correct and its group is in the top share
        r'_i = r_i                                                 otherwise

    mean and std are over the lengths of the correct completions of the group of i, as in `iapo.methods.length_penalty`.
    The top share is the `ceil(share * n)` most accurate of the batch's n groups.

    Source: arXiv 2505.18086, section 3, equations 1 and 2. share is the paper's lambda, 0.2; weight is its alpha, 0.2.

    Degenerate cases: a group whose correct completions all have the same length, or only one of which is correct, pays
    nothing.

    Differences: the paper's rewards are 1 and 0, here they lie 2 apart. Where the paper says nothing, we chose: of
    equally accurate groups those of the first prompts are taken, the number of groups is rounded up, and std is the
    population's. No code of the authors was found.

    Attributes:
        share: the share of the groups that pay for length; 0 is GRPO, with 1 all groups pay.
        weight: the most that length can cost, where a right answer has a reward of 1.
    """

    share: float = 0.2
    weight: float = 0.5

    needs = ("correct",)
    ignores: ClassVar[dict[str, str]] = {
        "filter_groups": "it drops the prompts with right answers alone, whose length is to be priced first"
    }

    def __post_init__(self) -> None:
        check_number("share", self.share, high=1)
        check_number("weight", self.weight)

    def shape_reward(self, batch: Batch) -> torch.Tensor:
        correct_B = batch.needed("correct")
        groups = sorted(batch.groups(), key=lambda rows: -correct_B[rows].float().mean().item())
        top = groups[: math.ceil(self.share * len(groups) - 1e-9)]  # 0.28 * 25 is a little more than 7
        rewards_B = batch.rewards.clone()
        if top:
            rows = torch.cat(top)
            rewards_B[rows] = LengthPenalty("sigmoid", self.weight).shape_reward(batch.rows(rows))
        return rewards_B
