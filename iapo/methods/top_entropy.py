"""A loss on the tokens of highest entropy alone: "Beyond the 80/20 rule" (Wang et al., arXiv 2506.01939)."""

import math
from dataclasses import dataclass

import torch

from iapo.methods.base import Batch, Method, check_number


@dataclass
class TopEntropy(Method):
    """Only forking tokens train: the `share` of the batch's tokens where the next token was least certain.

        token t of completion i is kept      if H[i,t] >= tau
        tau = the ceil(share N)-th highest entropy of the batch's N tokens

    H is the next-token entropy of the old policy. The batch's tokens are those that train: tokens that another method
    of the run leaves out of the loss have no rank. Completions without an advantage do have one. The mean of the loss
    is over the kept tokens, as in the released code; over all tokens the loss would be about `share` times as large.
    The recipe is otherwise DAPO, as in the paper, without KL loss. A KL loss, if one is set, is over the kept tokens
    too.

    Source: arXiv 2506.01939, section 5.2, equation 6.

    Degenerate cases: tokens equal to tau are all kept, so equal entropies everywhere keep everything. A completion may
    keep no token; the batch keeps at least one, if the other methods leave any.

    Differences: the released code ranks each micro-batch by itself, so its choice depends on how a batch is cut. It
    ranks by the entropy of the policy in training, which is the old policy's in the first update of a step. And it
    breaks ties.

    Attributes:
        share: of the tokens that train, above 0 and below 1.
    """

    share: float = 0.2

    needs = ("entropy",)
    masks_last = True

    def __post_init__(self) -> None:
        check_number("share", self.share, high=1)
        if self.share in (0, 1):
            what = "every token, which is variant=dapo" if self.share else "no token"
            raise ValueError(f"share: {self.share} keeps {what}; choose a number in between.")

    def loss_mask(self, batch: Batch, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if not mask.any():
            return mask
        entropy_BT = batch.needed("entropy")
        entropies = entropy_BT[mask]
        # The product of a decimal share is often just above a whole number, which must not become the next.
        count = max(1, math.ceil(round(self.share * len(entropies), 6)))
        return mask & (entropy_BT >= entropies.topk(count).values[-1])
