"""DLER: truncation, and advantages normalised over the batch (Liu et al., NVIDIA, arXiv 2510.15110)."""

from dataclasses import dataclass

import torch

from iapo.advantage import masked_zscore
from iapo.methods.base import Batch, Method, number


@dataclass
class Dler(Method):
    """Doing Length pEnalty Right: no reward beyond a target length, and one scale for the whole batch.

        r'_i   = r_i if L_i <= target_length, else truncated_reward
        A_i    = r'_i - mean of r' over i's group
        A[i,t] = (A_i - mean A) / std A,    mean and std over the tokens of the batch

    (equation 3). Groups in which all completions succeed, that is are correct within target_length, or none does,
    are left out of the loss and of mean and std (section 3.3), and so are tokens beyond target_length: what is left
    is a run whose responses end there. The recipe adds the paper's clip-higher (section 3.2) and dynamic sampling.

    Differences: the paper and its code cut the generation itself, at 4000 tokens; set target_length to
    data.max_response_length for that. Dynamic sampling replaces groups by their answers, before target_length is
    looked at, so groups without signal because of it are left out but not replaced. If every group is, advantages
    are 0. std is the population's; in the released code (verl's reinforce_plus_plus_baseline) the sample's. The
    paper's rewards are 1 and 0.

    Attributes:
        target_length: tokens of a response that count.
        truncated_reward: r' beyond them; the reward function's for a text that was cut, -1 without answer - 0.5.
    """

    target_length: int = 1
    truncated_reward: float = -1.5

    needs = ("correct",)
    ignores = {"overlong": "all completions beyond target_length get truncated_reward"}

    def __post_init__(self):
        number("target_length", self.target_length, low=1, whole=True)
        number("truncated_reward", self.truncated_reward, low=-float("inf"))

    def problems(self, rollouts: int, max_response_length: int):
        if self.target_length > max_response_length:
            yield (
                f"target_length: {self.target_length} exceeds data.max_response_length={max_response_length}, so that "
                "nothing is truncated by it; lower it."
            )

    def shape_reward(self, batch: Batch) -> torch.Tensor:
        return torch.where(batch.lengths > self.target_length, self.truncated_reward, batch.rewards)

    def outcome_advantage(self, batch: Batch) -> torch.Tensor:
        advantage_B = batch.rewards.clone()
        for rows in batch.groups():
            advantage_B[rows] -= batch.rewards[rows].mean()
        mask_BT = self._counted(batch)
        advantage_BT = advantage_B[:, None].expand(mask_BT.shape)
        return masked_zscore(advantage_BT.flatten(), mask_BT.flatten()).view(mask_BT.shape)

    def loss_mask(self, batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
        return self._counted(batch)

    def _counted(self, batch: Batch) -> torch.Tensor:
        """(B, T) bool: the tokens within the target length of groups with success and failure."""
        success_B = batch.correct & (batch.lengths <= self.target_length)
        mixed_B = torch.zeros_like(success_B)
        for rows in batch.groups():
            mixed_B[rows] = success_B[rows].any() & ~success_B[rows].all()
        within_T = torch.arange(batch.response_mask.shape[1]) < self.target_length
        return batch.response_mask.bool() & mixed_B[:, None] & within_T
