"""GTPO: the reward is shared out over tokens by their entropy (Tan et al., arXiv 2508.04349)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from iapo.methods.base import Batch, Method, check_choice, check_number

# A standard deviation of shaped rewards, which are around 1, up to which they count as equal.
NO_VARIANCE = 1e-6


@dataclass
class Gtpo(Method):
    r"""Group Token Policy Optimization: right answers credit uncertain tokens, wrong ones blame confident tokens.

        r+[i,t] =  (1 - alpha) + alpha d_t    H[i,t]  / sum_{k in O+}    H[k,t]      i in O+;  0 in O-
        r-[j,t] = -(1 - alpha) - alpha h_t (1/H[j,t]) / sum_{k in O-} (1/H[k,t])     j in O-;  0 in O+
        A[i,t]  = norm(r+[i,t]; r+)  for i in O+,    norm(r-[j,t]; r-)  for j in O-
        norm(x; v) = (x - mean v) / std v

    O+ and O- are the right and the wrong completions of a group. `d_t` and `h_t` count those of O+ and of O- that have
    a token t, and the sums run over the same completions. So r+ has the mean 1 and r- the mean -1 at every position. H
    is the next-token entropy of the old policy in nats, clipped to [entropy_low, entropy_high].

    The paper can be read in two ways about v. `zscore_over` "group": r+ is defined on all tokens of the group, 0 in O-,
    and v is all of them. The advantage then tends to GRPO's as entropies become equal, which appendix B wants.
    `zscore_over` "side": v is r+ on O+ alone, and r- on O- alone. Then the advantages of each side sum to 0, so right
    answers as such are not reinforced, and alpha cancels.

    Source: section 2.2, equations 3 to 6, of the ICML 2026 submission of arXiv 2508.04349.

    Degenerate cases: where only one completion of a side has a token t, its share is 1. A side without completions adds
    nothing. A group of one, and a group whose shaped rewards don't vary, get 0. In a group that is all right or all
    wrong only entropies differ, and their differences are scaled to unit variance; algorithm.filter_groups drops such
    groups.

    Differences: the paper's equations shape and normalise within the group, its discussion (section 4) within the
    batch; here it is the group. std is the population's; mean and std are over tokens. The paper's two weights are 1
    and 0.1; here they sum to 1, as its proposition 2.2 asks. Its length penalty (appendix D) is left out, and so are
    all rewards but that of the right answer. No code of the authors was found.

    Attributes:
        alpha: the share of a reward that entropy moves; 0 is GRPO with statistics over tokens.
        entropy_low: lower bound of the entropies, in nats.
        entropy_high: upper bound of the entropies, in nats.
        zscore_over: "group" or "side".
    """

    alpha: float = 0.1
    entropy_low: float = 0.2
    entropy_high: float = 0.28
    zscore_over: str = "group"

    needs = ("correct", "entropy")
    ignores: ClassVar[dict[str, str]] = {
        "shape_reward": "it judges by right and wrong alone",
        "overlong": "it judges by right and wrong alone",
    }

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, high=1)
        check_number("entropy_low", self.entropy_low, low=1e-6)  # wrong answers divide by it
        check_number("entropy_high", self.entropy_high, low=self.entropy_low)
        check_choice("zscore_over", self.zscore_over, ("group", "side"))
        if self.zscore_over == "side" and self.alpha != Gtpo.alpha:
            raise ValueError(f"alpha: {self.alpha} has no effect with zscore_over=side; use zscore_over=group.")

    def outcome_advantage(self, batch: Batch) -> torch.Tensor:
        return self._of_groups(batch, self._clipped(batch), batch.response_mask.bool())

    def _clipped(self, batch: Batch) -> torch.Tensor:
        return batch.needed("entropy").double().clamp(self.entropy_low, self.entropy_high)

    def _of_groups(self, batch: Batch, entropy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) float32 advantages from entropies and mask, both (B, T)."""
        advantages, correct_B = torch.zeros(entropy.shape), batch.needed("correct")
        for rows in batch.groups():
            values = shaped_advantages(entropy[rows], mask[rows], correct_B[rows], self.alpha, self.zscore_over)
            advantages[rows] = values.float()
        return advantages


def shaped_advantages(
    entropy: torch.Tensor, mask: torch.Tensor, correct: torch.Tensor, alpha: float, zscore_over: str
) -> torch.Tensor:
    """The equations of `Gtpo` for the G completions of one group.

    Args:
        entropy: (G, T) float64, positive; anything where the mask is 0.
        mask: (G, T) bool.
        correct: (G,) bool.
        alpha: as in `Gtpo`.
        zscore_over: as in `Gtpo`.

    Returns:
        (G, T) float64, 0 where the mask is 0.
    """
    advantages = torch.zeros_like(entropy)
    for sign, weight, side in ((1, entropy, correct), (-1, 1 / entropy, ~correct)):
        own = mask & side[:, None]
        if not own.any():
            continue
        weight = torch.where(own, weight, 0.0)
        share = weight * own.sum(0) / weight.sum(0)  # 0 / 0 where none is alive, which `own` leaves out
        rewards = torch.where(own, sign * (1 - alpha + alpha * share), 0.0)
        counted = rewards[own if zscore_over == "side" else mask]
        if (std := counted.std(correction=0)) > NO_VARIANCE:
            advantages += torch.where(own, (rewards - counted.mean()) / std, 0.0)
    return advantages
