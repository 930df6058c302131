"""GFPO: sample many, learn from few (Shrivastava et al., arXiv 2508.09726)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from iapo.methods.base import Batch, Method, check_choice, check_number


@dataclass
class Gfpo(Method):
    """Group Filtered Policy Optimization: only the best k of a group's G completions train.

        S   = the k completions of the group that are shortest, or that have most reward per token
        A_i = (r_i - mean_{j in S} r_j) / std_{j in S} r_j      for i in S;  0 for all others

    The loss and its KL term are means over the tokens of all G completions, those with A_i = 0 too. With `adaptive`, k
    depends on how hard the prompt is. The accuracies of all groups so far have quartiles q1 <= q2 <= q3. A group keeps
    `adaptive[n]` completions if n of the quartiles lie below its own accuracy, so hard prompts keep more. A quartile
    that equals its accuracy counts as below if more than half of the group is right: a solved prompt is easy even where
    most prompts are solved and the quartiles are 1.

    Source: arXiv 2508.09726, sections 3 and 3.1, equation 2 for the loss; section 3.2 for `adaptive`.

    Degenerate cases: a group of at most k completions keeps all. Of equal completions the shorter is kept, then the one
    that was sampled first.

    Differences: rewards here may be negative, which per token would favour long failures. Where the lowest reward of a
    group is negative, it is therefore subtracted first. The quartiles are exact; the paper estimates them with a
    t-digest. The paper measures difficulty by the mean reward, here it is the accuracy. The rules for ties are ours.
    The recipe keeps 4 of 8; the paper keeps 4 of 16 or of 24. No code of the authors was found.

    Attributes:
        k: completions kept per group.
        by: "length" or "reward_per_token".
        adaptive: k for each quarter of the prompts, hardest first (the paper: 8, 8, 6, 4 of 16), or None.
    """

    k: int = 4
    by: str = "length"
    adaptive: list[int] | None = None
    _seen: dict[float, int] = field(default_factory=dict, init=False)

    needs = ("correct",)

    def __post_init__(self) -> None:
        check_number("k", self.k, low=2, whole=True)  # one alone has no advantage
        check_choice("by", self.by, ("length", "reward_per_token"))
        if self.adaptive is not None:
            if not isinstance(self.adaptive, list) or len(self.adaptive) != 4:
                raise ValueError(f"adaptive: {self.adaptive!r} must be four numbers, [8,8,6,4], hardest quarter first.")
            for k in self.adaptive:
                check_number("adaptive", k, low=2, whole=True)

    def problems(self, rollouts: int, max_response_length: int) -> Iterator[str]:
        if self.adaptive and self.k not in (Gfpo.k, rollouts // 2):  # the recipe's is half of the rollouts
            yield f"k: {self.k} has no effect with adaptive={self.adaptive}; leave it out."
        largest = max(self.adaptive or [self.k])
        if largest >= rollouts:
            yield (
                f"{'adaptive' if self.adaptive else 'k'}: {largest} of actor_rollout_ref.rollout.n={rollouts} "
                "completions filters nothing; sample more or keep fewer."
            )

    def keep_completions(self, batch: Batch) -> torch.Tensor:
        kept_B = torch.zeros(len(batch.group), dtype=torch.bool)
        groups = batch.groups()
        correct_B = batch.needed("correct")
        accuracies = [correct_B[rows].float().mean().item() for rows in groups]
        for accuracy in accuracies:
            self._seen[accuracy] = self._seen.get(accuracy, 0) + 1
        for rows, accuracy in zip(groups, accuracies, strict=True):
            rows = rows[batch.lengths[rows].argsort(stable=True)]
            if self.by == "reward_per_token":
                rewards = batch.rewards[rows]
                per_token = (rewards - rewards.min().clamp(max=0)) / batch.lengths[rows]
                rows = rows[per_token.argsort(stable=True, descending=True)]
            kept_B[rows[: self._k(accuracy)]] = True
        return kept_B

    def _k(self, accuracy: float) -> int:
        if self.adaptive is None:
            return self.k
        values = torch.tensor(list(self._seen), dtype=torch.float64)
        values = values.repeat_interleave(torch.tensor(list(self._seen.values())))
        quartiles = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), interpolation="lower")
        passed = quartiles <= accuracy if accuracy > 0.5 else quartiles < accuracy
        return self.adaptive[int(passed.sum())]

    def state_dict(self) -> dict:
        return {"seen": [[accuracy, count] for accuracy, count in sorted(self._seen.items())]}

    def load_state_dict(self, state: dict) -> None:
        self._seen = dict(state["seen"])
