"""Token-level, information-aware advantages. Pure torch; `iapo.step` calls them once per training step.

    A[i,t] = outcome * GRPO(r_i)                          group-normalised outcome
           + alpha * norm(s[i,t]; s[i,:])                 informativeness
           + beta  * norm(c[i,t]; c[i,:])                 exploration adjustment
           + rho   * norm(rate_i; rates of the correct)   information rate (ours)
           + progress * norm(G[i,t]; G of the batch)      progress to go (ours), or
             progress * F[i,t]                            the outcome less a fitted baseline (ours)

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


def exploration(
    old_log_probs: torch.Tensor, correct: torch.Tensor, response_mask: torch.Tensor, form: str = IapoConfig.exploration
) -> torch.Tensor:
    """norm(c[i,t]; c[i,:]) with c = +pi_old(o_t) in a correct completion, -pi_old(o_t) in a wrong one (the paper).

    In a wrong completion the z-score is above 0 where a token was less probable than the others. The paper's form so
    praises half of a mistake.

    Args:
        old_log_probs: (B, T) log-probabilities of the sampled tokens under the old policy.
        correct: (B,) 1 if the completion's answer is right. The correctness signal, not the sign of a shaped reward.
        response_mask: (B, T).
        form: "paper", or "unpraised", where no value of a wrong completion is above 0.

    Returns:
        (B, T) float32; 0 for completions with zero variance, one token or none.
    """
    sign_B1 = torch.where(correct.bool(), 1.0, -1.0)[:, None]
    z_BT = masked_zscore(sign_B1 * old_log_probs.exp(), response_mask)
    return z_BT if form == "paper" else torch.where(correct.bool()[:, None], z_BT, z_BT.clamp(max=0))


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
    result_B = torch.zeros_like(rates_B)
    counted_B = correct.bool() & response_mask.bool().any(1)
    for rows in rows_by_group(index):
        result_B[rows] = masked_zscore(rates_B[rows], counted_B[rows])
    return result_B


def progress_to_go(
    values: torch.Tensor, region_mask: torch.Tensor, gamma: float = IapoConfig.gamma, price: float = IapoConfig.price
) -> torch.Tensor:
    """G_t = sum_{k>=0} gamma^k (v_{t+k} - v_{t+k-1} - price), over the R tokens of the reasoning (ours).

    With gamma = 1 it telescopes: G_t = v_R - v_{t-1} - price (R - t + 1), the outcome with a baseline that depends on
    the state, and the price of the reasoning that is still to come. So a token isn't blamed for what was said before
    it. For prior art on v as progress see docs/algorithm.md.

    Args:
        values: (B, T + 1) v_0 .. v_T, probabilities of the right answer, constant after the reasoning.
        region_mask: (B, T) 1 on the R first tokens of a row, its reasoning.
        gamma: in (0, 1].
        price: >= 0, of a token, in right answers.

    Returns:
        (B, T) float32, 0 outside of the reasoning; also at the exit marker, after which nothing is gained or paid.
    """
    delta_BT = (values[:, 1:].float() - values[:, :-1].float() - price) * region_mask
    G_BT = torch.zeros_like(delta_BT)
    G_B = torch.zeros_like(delta_BT[:, 0])
    for t in reversed(range(delta_BT.shape[1])):
        G_B = delta_BT[:, t] + gamma * G_B
        G_BT[:, t] = G_B
    return G_BT


def relative_progress(
    values: torch.Tensor, region_mask: torch.Tensor, response_mask: torch.Tensor, config: IapoConfig
) -> torch.Tensor:
    """norm(G[i,t] - c v[i,t-1]) over the batch, with G of `progress_to_go`, on the tokens that are `decided` (ours).

    c is the slope of the least squares of G on v_{t-1}. Without it everything after the answer is settled would be
    blamed, because there is nothing left to gain, and everything before it praised, whatever it is. That is noise: the
    policy doesn't choose v_{t-1} at t. c, mean and standard deviation are over these tokens of all completions. Over
    one completion, or over the right ones alone, they would be statistics of its length or of its outcome. The token
    that ends the reasoning has G = 0.

    Args:
        values: (B, T + 1) v_0 .. v_T.
        region_mask: (B, T) the reasoning. A completion that was cut has nothing but reasoning, and v says what it would
            have gained by answering.
        response_mask: (B, T).
        config: `gamma` and `price`.

    Returns:
        (B, T) float32; 0 on the answer, and everywhere where v_{t-1} tells all of G. With equal v c = 0.
    """
    region_BT = region_mask.bool() & response_mask.bool()
    decided_BT = decided(region_BT, response_mask)
    before_BT = values[:, :-1].float()
    G_BT = progress_to_go(values, region_BT, config.gamma, config.price)
    _, c = least_squares(before_BT[decided_BT], G_BT[decided_BT])
    return masked_zscore((G_BT - c * before_BT).flatten(), decided_BT.flatten()).view_as(G_BT)


def fitted_progress(
    values: torch.Tensor,
    correct: torch.Tensor,
    region_mask: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence,
    price: float = IapoConfig.price,
) -> torch.Tensor:
    """F_t = r - price (R - t + 1) - [a + c v_{t-1} - mean cost to go of the others at t], on `decided` tokens (ours).

    The outcome and the price of the reasoning still to come, less a baseline that is fitted. r is 1 for a right answer.
    (a, c) are the least squares of r on v_{t-1} over the tokens of all other prompts' completions, and the mean is over
    the other completions of the prompt that reason at t or end there. Neither depends on what completion i writes from
    t on, so for any v, also a wrong one, the gradient is that of E[r - price R] without bias. Nothing is divided by a
    standard deviation, which would weigh a prompt by how often it is answered.

    Args:
        values: (B, T + 1) v_0 .. v_T, probabilities of the right answer.
        correct: (B,) 1 if the completion's answer is right.
        region_mask, response_mask: (B, T); see `relative_progress`.
        index: (B,) group of each completion.
        price: >= 0, of a token, in right answers.

    Returns:
        (B, T) float32, 0 on the answer. With a single prompt a = 0 and c = 1, v itself. With equal v elsewhere c = 0
        and a is the mean outcome. At a token at which no other completion reasons or ends the mean cost is 0.
    """
    region_BT = region_mask.bool() & response_mask.bool()
    decided_BT = decided(region_BT, response_mask)
    cost_BT = price * region_BT.float().flip(1).cumsum(1).flip(1)
    before_BT = values[:, :-1].float()
    outcome_BT = correct.float()[:, None].expand_as(before_BT)
    F_BT = torch.zeros_like(before_BT)
    for rows in rows_by_group(index):
        elsewhere_BT = decided_BT.clone()
        elsewhere_BT[rows] = False
        a, c = least_squares(before_BT[elsewhere_BT], outcome_BT[elsewhere_BT])
        there_GT, cost_GT = decided_BT[rows].float(), cost_BT[rows] * decided_BT[rows]
        others_GT = (cost_GT.sum(0) - cost_GT) / (there_GT.sum(0) - there_GT).clamp(min=1)
        F_BT[rows] = outcome_BT[rows] - cost_GT - (a + c * before_BT[rows] - others_GT)
    return torch.where(decided_BT, F_BT, 0.0)


def least_squares(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """(a, c) that minimise sum (y - a - c x)^2; c = 0 where x are equal up to `ROUNDING`, (0, 1) without a point."""
    if not len(x):
        return 0.0, 1.0
    x, y = x.double(), y.double()
    if x.max() - x.min() <= ROUNDING:
        return y.mean().item(), 0.0
    centred_x = x - x.mean()
    c = (centred_x * y).sum() / centred_x.square().sum()
    return (y.mean() - c * x.mean()).item(), c.item()


def decided(region_BT: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: the tokens of the reasoning and the one that ends it.

    It is among them because a policy gives up reasoning by choosing it.
    """
    began_BT = torch.cat([torch.ones_like(region_BT[:, :1]), region_BT[:, :-1]], 1)  # before the token: all reasoning
    return began_BT & response_mask.bool()


def progress_values(
    exit_entropy: torch.Tensor, region_mask: torch.Tensor, index: Sequence, form: str = IapoConfig.progress_value
) -> torch.Tensor:
    """(B, T + 1) v_t = exp(-h_t) of surprisals h_t of the right answer in nats, or a falsifier's.

    Args:
        exit_entropy: (B, T + 1).
        region_mask: (B, T) the reasoning.
        index: (B,) group of each completion.
        form: "measured", "shuffled" (see `of_another`) or "none", 0 everywhere.
    """
    v_BT1 = torch.exp(-exit_entropy)
    if form == "shuffled":
        return of_another(v_BT1, region_mask, index)
    return torch.zeros_like(v_BT1) if form == "none" else v_BT1


def of_another(values: torch.Tensor, region_mask: torch.Tensor, index: Sequence) -> torch.Tensor:
    """(B, T + 1) each row's values replaced by those of the next row of its group, stretched to its own reasoning.

    The first of a group follows its last. The first and last positions map to each other; those between take the value
    of the nearest position. A completion that is alone in its group keeps its own.
    """
    length_B = region_mask.bool().sum(1)
    t_T1 = torch.arange(values.shape[1], device=values.device)
    result = values.clone()
    for rows in rows_by_group(index):
        for own, other in zip(rows, rows[1:] + rows[:1], strict=True):
            position_T1 = t_T1.clamp(max=length_B[own]) * length_B[other] / length_B[own].clamp(min=1)
            result[own] = values[other, position_T1.round().long()]
    return result


def rows_by_group(index: Sequence[Hashable] | torch.Tensor) -> list[list[int]]:
    """The row numbers of each group, in the order in which the groups appear."""
    members: dict[Hashable, list[int]] = {}
    # The elements of a tensor are hashed by identity: each would be a group of its own.
    for i, group in enumerate(index.tolist() if isinstance(index, torch.Tensor) else index):
        members.setdefault(group, []).append(i)
    return list(members.values())


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
        config: weights outcome, alpha, beta, rho, progress >= 0 and what their terms read. With `gate` "correct" the
            informativeness term is added to correct completions only, with "all" (the paper) to all.
        index: (B,) group of each completion.
        exit_entropy: (B, T + 1) in nats, or `iapo.information.next_token_entropies`; needed by alpha,
            rho and progress.
        region_mask: (B, T) tokens whose information was measured; needed by alpha and progress.
        old_log_probs: (B, T); needed by beta.
        correct: (B,); needed by beta, rho, the gate and the fitted form of progress.

    Returns:
        advantages (B, T) and the weighted terms by name, each (B, T), which sum to it. A truncated completion is a
        wrong one whose region is all it wrote. With all other weights 0 and outcome 1, `outcome` itself: GRPO bit for
        bit.

    Raises:
        ValueError: an input that a non-zero weight needs is missing, or `index` has another length.
    """

    def needed(name: str, value: torch.Tensor | None, by: str) -> torch.Tensor:
        if value is None:
            off = {"gate": "all", "progress_form": "to_go"}.get(by, 0)
            raise ValueError(
                f"{name}: None, but iapo.{by}={getattr(config, by)} needs it; pass it or set iapo.{by}={off}."
            )
        return value

    if len(index) != len(outcome):
        raise ValueError(f"index: {len(index)} entries must be {len(outcome)}, one for each completion.")
    terms = {"outcome": outcome if config.outcome == 1 else config.outcome * outcome}
    if config.alpha > 0:
        term = informativeness(
            needed("exit_entropy", exit_entropy, "alpha"), needed("region_mask", region_mask, "alpha")
        )
        everywhere = config.gate == "all"
        gate_B1 = torch.ones(len(outcome), 1) if everywhere else needed("correct", correct, "gate").float()[:, None]
        terms["informativeness"] = config.alpha * gate_B1.to(outcome.device) * term
    if config.beta > 0:
        old_BT, correct_B = needed("old_log_probs", old_log_probs, "beta"), needed("correct", correct, "beta")
        term = exploration(old_BT, correct_B, response_mask, config.exploration)
        terms["exploration"] = config.beta * term
    if config.rho > 0:
        h_BT1, correct_B = needed("exit_entropy", exit_entropy, "rho"), needed("correct", correct, "rho")
        rate_B = relative_information_rate(h_BT1, correct_B, response_mask, index)
        terms["information_rate"] = config.rho * rate_B[:, None] * response_mask
    if config.progress > 0:
        h_BT1 = needed("exit_entropy", exit_entropy, "progress")
        region_BT = needed("region_mask", region_mask, "progress")
        v_BT1 = progress_values(h_BT1, region_BT, index, config.progress_value)
        if config.progress_form == "fitted":
            correct_B = needed("correct", correct, "progress_form")
            term = fitted_progress(v_BT1, correct_B, region_BT, response_mask, index, config.price)
        else:
            term = relative_progress(v_BT1, region_BT, response_mask, config)
        terms["progress"] = config.progress * term
    if len(terms) == 1:
        return terms["outcome"], terms
    return torch.stack(list(terms.values())).sum(0), terms


def advantage_shares(terms: dict[str, torch.Tensor], response_mask: torch.Tensor) -> dict[str, float]:
    """Share of the advantage that each term makes up: sum_{i,t} |term| / sum over terms of the same; 0 if all are 0."""
    sizes = {name: (term.abs() * response_mask).sum().item() for name, term in terms.items()}
    total = sum(sizes.values())
    return {name: size / total if total > 0 else 0.0 for name, size in sizes.items()}
