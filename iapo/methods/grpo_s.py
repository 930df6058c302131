"""GRPO-S: an answer's worth is shared out over the completions by entropy (Tan et al., arXiv 2508.04349)."""

from dataclasses import dataclass

import torch

from iapo.methods.base import Batch
from iapo.methods.gtpo import Gtpo


@dataclass
class GrpoS(Gtpo):
    r"""Sequence-level GRPO: GTPO with one entropy, the mean H_i of its tokens', and one advantage per completion.

        r+_i =  (1 - alpha) + alpha n    H_i  / sum_{k in O+}    H_k      i in O+, n of them;  0 in O-
        r-_j = -(1 - alpha) - alpha m (1/H_j) / sum_{k in O-} (1/H_k)     j in O-, m of them;  0 in O+
        A_i  = norm(r+_i; r+)  for i in O+,    norm(r-_j; r-)  for j in O-

    (section 2.3, equations 8 and 9 of the ICML 2026 submission; the paper's beta_2 is alpha, its beta_1 is 1 - alpha).
    All else is as in `Gtpo`: the knobs, the degenerate groups, the differences. That v is the whole group is explicit
    here. Entropies are clipped before their mean is taken, which the paper leaves open.

    The objective (equations 10 and 11) is a mean over completions of a clipped mean of ratios. On the policy that
    sampled, where all ratios are 1, its gradient is that of loss_agg_mode=seq-mean-token-mean, which the recipe sets;
    in later updates of a step the paper clips a completion's mean ratio, verl each token's.
    """

    def outcome_advantage(self, batch: Batch) -> torch.Tensor:
        mask_BT = batch.response_mask.bool()
        mean_B = torch.where(mask_BT, self._clipped(batch), 0.0).sum(1) / mask_BT.sum(1)
        return self._of_groups(batch, mean_B[:, None], torch.ones_like(mask_BT[:, :1])) * mask_BT
