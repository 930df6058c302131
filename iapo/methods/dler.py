"""DLER: a hard target length, and advantages normalised over the batch (Liu et al., NVIDIA, arXiv 2510.15110)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from iapo.advantage import centred, masked_zscore
from iapo.methods.base import Batch, Method, check_number


@dataclass
class Dler(Method):
    """Doing Length pEnalty Right: no reward beyond a target length, and one scale of advantages for the whole batch.

        r'_i   = r_i if L_i <= target_length, else truncated_reward
        A_i    = r'_i - mean of r' over the group of i
        A[i,t] = (A_i - mean A) / std A      mean and std over the counted tokens of the batch

    `L_i` is the length of completion i. A completion succeeds if it is correct and `L_i <= target_length`. A group
    counts if some of its completions succeed and some don't. A token counts if its group does and it is not beyond
    target_length. All other tokens are left out of the loss, the mean and std. The effect is that of a run whose
    responses end at target_length. The recipe adds the paper's clip-higher (section 3.2) and dynamic sampling.

    Source: arXiv 2510.15110, equation 3; section 3.3 for the groups that are left out.

    Degenerate cases: if no group counts, all advantages are 0.

    Differences: the paper and its code cut the generation itself, at 4000 tokens; for that, set target_length to
    data.max_response_length. Dynamic sampling replaces groups by their answers alone. Groups that fail to count only
    because of target_length are therefore left out but not replaced. std is the population's; in the released code
    (verl's reinforce_plus_plus_baseline) it is the sample's. The paper's rewards are 1 and 0.

    Attributes:
        target_length: how many tokens of a response count.
        truncated_reward: the reward of a longer response. The default is what the reward function gives to a text that
            was cut: -1 without an answer, -0.5 for its format.
    """

    target_length: int = 1
    truncated_reward: float = -1.5

    needs = ("correct",)
    ignores: ClassVar[dict[str, str]] = {"overlong": "all completions beyond target_length get truncated_reward"}

    def __post_init__(self) -> None:
        check_number("target_length", self.target_length, low=1, whole=True)
        check_number("truncated_reward", self.truncated_reward, low=-float("inf"))

    def problems(self, rollouts: int, max_response_length: int) -> Iterator[str]:
        if self.target_length > max_response_length:
            yield (
                f"target_length: {self.target_length} exceeds data.max_response_length={max_response_length}, so that "
                "nothing is truncated by it; lower it."
            )

    def shape_reward(self, batch: Batch) -> torch.Tensor:
        return torch.where(batch.lengths > self.target_length, self.truncated_reward, batch.rewards)

    def outcome_advantage(self, batch: Batch) -> torch.Tensor:
        advantage_B = torch.zeros_like(batch.rewards)
        for rows in batch.groups():
            advantage_B[rows] = centred(batch.rewards[rows])
        mask_BT = self._counted(batch)
        advantage_BT = advantage_B[:, None].expand(mask_BT.shape)
        return masked_zscore(advantage_BT.flatten(), mask_BT.flatten()).view(mask_BT.shape)

    def loss_mask(self, batch: Batch, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._counted(batch)

    def _counted(self, batch: Batch) -> torch.Tensor:
        """(B, T) bool: the tokens within the target length, of groups with both success and failure."""
        success_B = batch.needed("correct") & (batch.lengths <= self.target_length)
        mixed_B = torch.zeros_like(success_B)
        for rows in batch.groups():
            mixed_B[rows] = success_B[rows].any() & ~success_B[rows].all()
        within_T = torch.arange(batch.response_mask.shape[1]) < self.target_length
        return batch.response_mask.bool() & mixed_B[:, None] & within_T
