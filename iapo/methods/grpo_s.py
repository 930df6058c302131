"""GRPO-S: the reward is shared out over completions by their entropy (Tan et al., arXiv 2508.04349)."""

from dataclasses import dataclass

import torch

from iapo.methods.base import Batch
from iapo.methods.gtpo import Gtpo


@dataclass
class GrpoS(Gtpo):
    r"""Sequence-level GRPO: GTPO with one entropy, the mean of its tokens', and one advantage per completion.

        r+_i =  (1 - alpha) + alpha n    H_i  / sum_{k in O+}    H_k      i in O+, n of them;  0 in O-
        r-_j = -(1 - alpha) - alpha m (1/H_j) / sum_{k in O-} (1/H_k)     j in O-, m of them;  0 in O+
        A_i  = norm(r+_i; r+)  for i in O+,    norm(r-_j; r-)  for j in O-

    `H_i` is the mean entropy of completion i. The knobs, the degenerate groups and the differences are those of GTPO
    (`Gtpo`).

    The paper's objective (equations 10 and 11) is a mean over completions of a clipped mean of ratios. On the policy
    that sampled, all ratios are 1, and its gradient is that of `loss_agg_mode=seq-mean-token-mean`, which the recipe
    sets. In later updates of a step the paper clips the mean ratio of a completion; verl clips the ratio of each token.

    Source: section 2.3, equations 8 and 9, of the ICML 2026 submission of arXiv 2508.04349. The paper's beta_2 is
    alpha, its beta_1 is 1 - alpha.

    Differences: the paper says here that norm is over the whole group. It leaves open whether entropies are clipped
    before or after their mean is taken; here it is before.
    """

    def outcome_advantage(self, batch: Batch) -> torch.Tensor:
        mask_BT = batch.response_mask.bool()
        mean_B = torch.where(mask_BT, self._clipped(batch), 0.0).sum(1) / mask_BT.sum(1)
        return self._of_groups(batch, mean_B[:, None], torch.ones_like(mask_BT[:, :1])) * mask_BT
