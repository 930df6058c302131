"""Token-level, information-aware advantages. Pure torch; `iapo.step` calls them once per training step.

    A[i,t] = GRPO(r_i)                                    group-normalised outcome
           + alpha * norm(s[i,t]; s[i,:])                 informativeness
           + beta  * norm(c[i,t]; c[i,:])                 exploration adjustment
           + rho   * norm(rate_i; rates of the correct)   information rate (ours)

The first three terms are the paper's (arXiv 2602.19049, section on the advantage); norm(x; v) = (x - mean v) / std v.
docs/algorithm.md shows each equation with its code. Shape suffixes as in `iapo.information`.
"""

from collections.abc import Hashable, Sequence

import torch

from iapo.config import IapoConfig
from iapo.information import information_gain, information_rate

# Values whose spread is at most this share of the largest of them, or of 1, count as equal: what is left of them after
# their mean is taken away is rounding.
ROUNDING = 1e-6


def masked_zscore(values: torch.Tensor, mask: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """z = (x - mean) / std over the last dimension, over masked-in entries only.

    Args:
        values: (..., T); entries that are masked out may hold anything, NaN included.
        mask: (..., T) 1 where an entry counts.
        eps: a standard deviation of at most eps counts as zero variance. The default, 1e-6, is below the accuracy of
            an exit entropy, so that rounding noise is never blown up to unit variance.

    Returns:
        (..., T) float32 with population (not sample) standard deviation, so sum(z) = 0 and mean(z^2) = 1 over the
        valid entries. 0 outside the mask, and 0 everywhere where the variance is zero, the values are equal up to
        `ROUNDING`, or fewer than two are valid.
    """
    mask = mask.bool()
    spread = torch.where(mask, values, -torch.inf).amax(-1, True) - torch.where(mask, values, torch.inf).amin(-1, True)
    values = torch.where(mask, values.float(), 0.0)
    differ = spread > ROUNDING * values.abs().amax(-1, keepdim=True).clamp(min=1)
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    centred = torch.where(mask, values - values.sum(-1, keepdim=True) / count, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return torch.where(differ & (std > eps), centred / std.clamp(min=eps), 0.0)


def grpo_advantage(
    rewards: torch.Tensor, response_mask: torch.Tensor, group: torch.Tensor, divide_by_std: bool = True
) -> torch.Tensor:
    """A_i = (r_i - mean r) / (std r + 1e-6) over the completions of i's group, on every token of completion i.

    GRPO (arXiv 2402.03300, section 4.1), with the sample standard deviation. It is bit for bit verl's
    `compute_grpo_outcome_advantage`, with two exceptions where it is 0 and verl's is not. verl gives a completion that
    is alone in its group, because other rollouts failed, its raw reward. And where equal rewards are no binary
    fractions, such as 0.1, verl divides what rounding leaves of r - mean r by 1e-6.

    Args:
        rewards: (B,).
        response_mask: (B, T).
        group: (B,) number of the prompt that a completion answers.
        divide_by_std: False leaves the division out (Dr. GRPO, arXiv 2503.20783, section 3.2).

    Returns:
        (B, T), 0 outside of the mask, in groups of one, and in groups whose rewards are equal up to `ROUNDING`.
    """
    advantage_B = torch.zeros_like(rewards)
    for number in group.unique():
        rows = (group == number).nonzero().flatten()
        advantage_B[rows] = centred(rewards[rows])
        if divide_by_std and len(rows) > 1:
            advantage_B[rows] /= rewards[rows].std() + 1e-6
    return advantage_B[:, None] * response_mask


def centred(rewards_G: torch.Tensor) -> torch.Tensor:
    """(G,) r - mean r; exactly 0 for a single reward and where all are equal up to `ROUNDING`."""
    equal = rewards_G.max() - rewards_G.min() <= ROUNDING * rewards_G.abs().max().clamp(min=1)
    return torch.zeros_like(rewards_G) if equal else rewards_G - rewards_G.mean()


def informativeness(exit_entropy: torch.Tensor, region_mask: torch.Tensor) -> torch.Tensor:
    """norm(s[i,t]; s[i,:]) with s the information gain, over the tokens of one completion (the paper's first term).

    Args:
        exit_entropy: (B, T + 1) in nats.
        region_mask: (B, T) the tokens whose information counts; the others get 0 and are left out of the statistics.

    Returns:
        (B, T) float32; 0 for completions with zero variance, one token or none.
    """
    return masked_zscore(information_gain(exit_entropy, region_mask), region_mask)


def exploration(old_log_probs: torch.Tensor, correct: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """norm(c[i,t]; c[i,:]) with c = +pi_old(o_t) in a correct completion, -pi_old(o_t) in a wrong one (the paper).

    Args:
        old_log_probs: (B, T) log-probabilities of the sampled tokens under the old policy.
        correct: (B,) 1 if the completion's answer is right. The correctness signal, not the sign of a shaped reward.
        response_mask: (B, T).

    Returns:
        (B, T) float32; 0 for completions with zero variance, one token or none.
    """
    sign_B1 = torch.where(correct.bool(), 1.0, -1.0)[:, None]
    return masked_zscore(sign_B1 * old_log_probs.exp(), response_mask)


def relative_information_rate(
    exit_entropy: torch.Tensor, correct: torch.Tensor, response_mask: torch.Tensor, index: Sequence
) -> torch.Tensor:
    """norm(rate_i; rates of the correct completions of i's group) for correct completions, 0 for wrong ones (ours).

    A z-score within a completion moves credit between its tokens; this term compares completions, the same on each of
    their tokens: of two correct ones that carry the same information, the shorter gains. h_0 is one number per prompt,
    so where the trace always settles the answer (h_T near 0) this is norm(1 / tokens), a price on length. Information
    below zero counts as none: divided by its tokens, it would make the longer of two completions the better one.

    Args:
        exit_entropy: (B, T + 1) in nats.
        correct: (B,) 1 if the completion's answer is right.
        response_mask: (B, T) of the whole response.
        index: (B,) group of each completion; any hashable values.

    Returns:
        (B,) float32; 0 where fewer than two completions of the group are correct or their rates are equal.
    """
    rates_B = information_rate(exit_entropy, response_mask).clamp(min=0)
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(index):
        members.setdefault(group, []).append(i)
    result_B = torch.zeros_like(rates_B)
    counted_B = correct.bool() & response_mask.bool().any(1)
    for rows in members.values():
        result_B[rows] = masked_zscore(rates_B[rows], counted_B[rows])
    return result_B


def iapo_advantage(
    outcome: torch.Tensor,
    response_mask: torch.Tensor,
    config: IapoConfig,
    *,
    index: Sequence,
    exit_entropy: torch.Tensor | None = None,
    region_mask: torch.Tensor | None = None,
    old_log_probs: torch.Tensor | None = None,
    correct: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The advantage of the module docstring, from an outcome advantage and what its terms need.

    Args:
        outcome: (B, T) group-normalised outcome advantage, GRPO's, 0 on padding.
        response_mask: (B, T).
        config: weights alpha, beta, rho >= 0 and `gate`: with "correct" the informativeness term is added to correct
            completions only, with "all" (the paper) to all.
        index: (B,) group of each completion.
        exit_entropy: (B, T + 1) in nats, or `iapo.information.next_token_entropies`; needed by alpha and rho.
        region_mask: (B, T) tokens whose information was measured; needed by alpha.
        old_log_probs: (B, T); needed by beta.
        correct: (B,); needed by beta, rho and the gate.

    Returns:
        advantages (B, T) and the weighted terms by name, each (B, T), which sum to it. A truncated completion is a
        wrong one whose region is all it wrote. With all weights 0, `outcome` itself: GRPO bit for bit.

    Raises:
        ValueError: an input that a non-zero weight needs is missing.
    """

    def needed(name: str, value: torch.Tensor | None) -> torch.Tensor:
        if value is None:
            weights = dict(alpha=config.alpha, beta=config.beta, rho=config.rho, gate=config.gate)
            raise ValueError(f"{name}: None, but the weights {weights} need it; pass it or set the weight to 0.")
        return value

    terms = {"outcome": outcome}
    if config.alpha > 0:
        term = informativeness(needed("exit_entropy", exit_entropy), needed("region_mask", region_mask))
        everywhere = config.gate == "all"
        gate_B1 = torch.ones(len(outcome), 1) if everywhere else needed("correct", correct).float()[:, None]
        terms["informativeness"] = config.alpha * gate_B1.to(outcome.device) * term
    if config.beta > 0:
        term = exploration(needed("old_log_probs", old_log_probs), needed("correct", correct), response_mask)
        terms["exploration"] = config.beta * term
    if config.rho > 0:
        h_BT1 = needed("exit_entropy", exit_entropy)
        rate_B = relative_information_rate(h_BT1, needed("correct", correct), response_mask, index)
        terms["information_rate"] = config.rho * rate_B[:, None] * response_mask
    if len(terms) == 1:
        return outcome, terms
    return torch.stack(list(terms.values())).sum(0), terms


def advantage_shares(terms: dict[str, torch.Tensor], response_mask: torch.Tensor) -> dict[str, float]:
    """Share of the advantage that each term makes up: sum_{i,t} |term| / sum over terms of the same; 0 if all are 0."""
    sizes = {name: (term.abs() * response_mask).sum().item() for name, term in terms.items()}
    total = sum(sizes.values())
    return {name: size / total if total > 0 else 0.0 for name, size in sizes.items()}
