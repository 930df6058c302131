"""GRPO-lambda: a price on length only where a prompt is mastered (Dai et al., arXiv 2505.18086)."""

import math
from dataclasses import dataclass

import torch

from iapo.methods.base import Batch, Method, number
from iapo.methods.length_penalty import LengthPenalty


@dataclass
class GrpoLambda(Method):
    """The sigmoid length penalty in the groups of the batch with the highest accuracy; the others keep their rewards.

        r'_i = r_i - weight * sigmoid((L_i - mean L) / std L)    if i is correct and its group is in the top share
        r'_i = r_i                                               otherwise

    with mean and std over the correct completions of i's group, as in `iapo.methods.length_penalty`, and the top
    share the ceil(share * n) most accurate of the batch's n groups (section 3, equations 1 and 2; share is the paper's
    lambda, 20%, and weight its alpha, 0.2).

    Differences: the paper's rewards are 1 and 0, here they lie 2 apart. Our choices, where it says nothing: of equally
    accurate groups those of the first prompts are taken, the number of groups is rounded up, and std is the
    population's. No code of the authors' was found.

    Attributes:
        share: of the groups that length is priced in; 0 is GRPO, 1 prices all.
        weight: the most that length can cost, next to a reward of 1 for a right answer.
    """

    share: float = 0.2
    weight: float = 0.5

    needs = ("correct",)

    def __post_init__(self):
        number("share", self.share, high=1)
        number("weight", self.weight)

    def shape_reward(self, batch: Batch) -> torch.Tensor:
        groups = sorted(batch.groups(), key=lambda rows: -batch.correct[rows].float().mean().item())
        top = groups[: math.ceil(self.share * len(groups) - 1e-9)]  # 0.28 * 25 is a little more than 7
        rewards_B = batch.rewards.clone()
        if top:
            rows = torch.cat(top)
            rewards_B[rows] = LengthPenalty("sigmoid", self.weight).shape_reward(batch.rows(rows))
        return rewards_B
