"""GTPO: conflict tokens and an entropy filter (Simoni et al., arXiv 2508.03772). Not the GTPO of Tan et al."""

import math
from dataclasses import dataclass, field

import torch

from iapo.advantage import centred
from iapo.methods.base import Batch, Method, check_number


@dataclass
class GtpoTrajectory(Method):
    """Group-relative Trajectory-based Policy Optimization: no penalty on what good and bad completions share.

        A_i     = r_i - mean of the group's rewards
        A[i,t]  = delta_i lambda[i,t] (A_i - entropy_weight <H>_i)

        lambda  = 0               if token t is in conflict and A_i < 0
                = amplification   if token t is in conflict and A_i > 0
                = 1               otherwise
        delta_i = 0 if <H>_i > max_entropy >= <H>_initial, else 1

    `<H>_i` is the mean next-token entropy of completion i. Two runs of tokens can be in conflict: one from the start of
    a completion and one from its end, where the tokens of the format are. A token belongs to the first run if it, and
    every token before it, is also at the same position of some completion of the group with the other sign of A.
    The second run is the same with positions counted from the end. The paper calls this conflict-aware gradient
    correction, and the entropy term entropy-based regularisation. Like the paper, the recipe takes the mean per
    completion first and has no KL.

    Source: arXiv 2508.03772; its first version for the objective.

    Degenerate cases: in a group whose rewards are all equal no token is in conflict, and the entropy term is all that
    is left.

    Differences: `<H>_initial` is the mean over the first training step. The entropy is subtracted from the advantage,
    as in the released code; in the objective of the paper's first version it is a term of its own, `-gamma <H>_i`. The
    released code also compares with 0.7 whatever the initial entropy, weighs a token that is in both runs by 4, and
    divides the loss of a completion by the number of its tokens in conflict; that objective doesn't divide so.
    Entropies are the old policy's. The paper makes one update per batch, so old and new policy are the same.

    Attributes:
        amplification: lambda of the tokens in conflict in good completions.
        entropy_weight: the paper's gamma.
        max_entropy: in nats; ln 2 is the entropy of an even choice between two tokens.
    """

    amplification: float = 2.0
    entropy_weight: float = 0.1
    max_entropy: float = math.log(2)
    _initial_entropy: float | None = field(default=None, init=False)

    needs = ("tokens", "entropy")

    def __post_init__(self) -> None:
        check_number("amplification", self.amplification, low=1)
        check_number("entropy_weight", self.entropy_weight)
        check_number("max_entropy", self.max_entropy)

    def outcome_advantage(self, batch: Batch) -> torch.Tensor:
        advantage_B = centred_rewards(batch) - self.entropy_weight * mean_entropy(batch)
        return advantage_B[:, None] * batch.response_mask

    def token_weight(self, batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
        entropy_B, sign_B = mean_entropy(batch), centred_rewards(batch).sign()
        if self._initial_entropy is None:
            self._initial_entropy = entropy_B.mean().item()
        kept_B = (entropy_B <= self.max_entropy) | (self._initial_entropy > self.max_entropy)
        weight_B1 = torch.where(sign_B > 0, self.amplification, 0.0)[:, None]
        return torch.where(conflict_tokens(batch, sign_B), weight_B1, 1.0) * kept_B[:, None]

    def state_dict(self) -> dict:
        return {} if self._initial_entropy is None else {"initial_entropy": self._initial_entropy}

    def load_state_dict(self, state: dict) -> None:
        self._initial_entropy = state.get("initial_entropy")


def centred_rewards(batch: Batch) -> torch.Tensor:
    """(B,) r_i - mean of the group's rewards; exactly 0 where only rounding makes it another number."""
    centred_B = torch.zeros_like(batch.rewards)
    for rows in batch.groups():
        centred_B[rows] = centred(batch.rewards[rows])
    return torch.where(centred_B.abs() > 1e-6, centred_B, 0.0)


def mean_entropy(batch: Batch) -> torch.Tensor:
    """(B,) mean next-token entropy of each completion, in nats."""
    return (batch.needed("entropy") * batch.response_mask).sum(1) / batch.lengths


def conflict_tokens(batch: Batch, sign: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: the tokens in conflict, given the sign (B,) of each completion's advantage."""
    tokens_BT = batch.needed("tokens")
    conflict_BT = torch.zeros(tokens_BT.shape, dtype=torch.bool)
    for rows in batch.groups():
        tokens, mask = tokens_BT[rows], batch.response_mask[rows].bool()
        from_end = (mask.sum(1, keepdim=True) - 1 - torch.arange(mask.shape[1])).clamp(min=0)
        forward = shared_run(tokens, mask, sign[rows])
        backward = shared_run(tokens.gather(1, from_end), mask, sign[rows])
        conflict_BT[rows] = forward | (backward.gather(1, from_end) & mask)
    return conflict_BT


def shared_run(tokens: torch.Tensor, mask: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """(G, T) bool: the run from column 0 whose tokens a completion of the other sign has in the same columns."""
    shared_GT = torch.zeros_like(mask)
    for i in range(len(tokens)):
        others = sign * sign[i] < 0
        shared_GT[i] = ((tokens[others] == tokens[i]) & mask[others] & mask[i]).any(0)
    return shared_GT.long().cumprod(1).bool()
