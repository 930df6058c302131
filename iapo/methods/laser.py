"""LASER and LASER-D: a bonus for right answers within a target length (Liu et al., arXiv 2505.15612)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from iapo.methods.base import Batch, Method, check_number

LEVELS = ("easy", "medium", "hard")


@dataclass
class Laser(Method):
    """Length-bAsed StEp Reward, and with `adaptive` its Dynamic and Difficulty-aware form.

        r'_i = r_i + bonus      if completion i is correct and L_i <= L_T;  else r_i

    LASER has one target length `L_T`. LASER-D has one for each difficulty d of a prompt: easy if at least 2/3 of the
    group's K completions are correct, medium if at least 1/3, else hard. Every `every` steps, `L_T` becomes the
    smallest length of at least `target_length` within which one complete correct response is expected:

        ECR_d = P(L <= L_T | d) |C_d| >= 1,      |C_d| = ceil(2K/3), ceil(K/3), 1

    P is over all completions of prompts of difficulty d, right and wrong. `|C_d|` is the fewest correct completions
    that make a prompt easy, medium or hard. K is the size of the largest group of the step.

    Source: arXiv 2505.15612, section 4.3 and table 2; section 5.2 for LASER-D.

    Degenerate cases: a difficulty without completions since the last update keeps its target. Before its first
    completions it has none, and every right answer gets the bonus.

    Differences: P is from the training completions since the last update; the paper samples 500 monitoring prompts. The
    targets of the first step are from its own completions. `L_T` is searched token by token, in the paper every 1024.
    The released code rounds `|C_d|` down, to 5, 2, 1 for K = 8, and takes the longest response of the batch where no
    length suffices. The paper's rewards are 1 and -0.5, here they lie 2 apart.

    Attributes:
        target_length: `L_T` in tokens; with `adaptive` its lower bound.
        bonus: the paper's alpha.
        adaptive: LASER-D instead of LASER.
        every: training steps between two updates of the targets of `adaptive`.
    """

    target_length: int = 1
    bonus: float = 0.5
    adaptive: bool = False
    every: int = 20
    _targets: dict[str, int] = field(default_factory=dict, init=False)
    _lengths: dict[str, list[int]] = field(default_factory=lambda: {level: [] for level in LEVELS}, init=False)

    needs = ("correct",)

    def __post_init__(self) -> None:
        check_number("target_length", self.target_length, low=1, whole=True)
        check_number("bonus", self.bonus)
        check_number("every", self.every, low=1, whole=True)
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive: {self.adaptive!r} must be true or false.")
        if self.every != Laser.every and not self.adaptive:
            raise ValueError(f"every: {self.every} has no effect with adaptive=false; set adaptive=true.")

    def problems(self, rollouts: int, max_response_length: int) -> Iterator[str]:
        if self.target_length >= max_response_length:
            yield (
                f"target_length: {self.target_length} of data.max_response_length={max_response_length} tokens gives "
                "every right answer the bonus; lower it."
            )

    def shape_reward(self, batch: Batch) -> torch.Tensor:
        target_B = self._adapted(batch) if self.adaptive else torch.tensor(self.target_length)
        return batch.rewards + self.bonus * (batch.needed("correct") & (batch.lengths <= target_B))

    def _adapted(self, batch: Batch) -> torch.Tensor:
        """(B,) target lengths, updated first if an update is due."""
        correct_B = batch.needed("correct")
        groups = [(rows, difficulty(correct_B[rows])) for rows in batch.groups()]
        for rows, level in groups:
            self._lengths[level] += [int(length) for length in batch.lengths[rows]]
        if (batch.step - 1) % self.every == 0:
            self._update(rollouts=max(len(rows) for rows, _ in groups))
        target_B = torch.zeros(len(batch.group))
        for rows, level in groups:
            target_B[rows] = self._targets.get(level, math.inf)
        return target_B

    def _update(self, rollouts: int) -> None:
        fewest_correct = {"easy": -(-2 * rollouts // 3), "medium": -(-rollouts // 3), "hard": 1}
        for level, lengths in self._lengths.items():
            if lengths:
                within = -(-len(lengths) // fewest_correct[level])  # so many completions, and ECR is 1
                self._targets[level] = max(self.target_length, sorted(lengths)[within - 1])
                lengths.clear()

    def state_dict(self) -> dict:
        if not self.adaptive:
            return {}
        targets = {f"target_{level}": target for level, target in self._targets.items()}
        return targets | {"lengths": {level: list(lengths) for level, lengths in self._lengths.items()}}

    def load_state_dict(self, state: dict) -> None:
        if self.adaptive:
            self._targets = {level: state[f"target_{level}"] for level in LEVELS if f"target_{level}" in state}
            self._lengths = {level: list(lengths) for level, lengths in state["lengths"].items()}


def difficulty(correct: torch.Tensor) -> str:
    """The difficulty of a prompt, by how many of its completions (K,) are correct."""
    thirds = 3 * int(correct.sum()) // len(correct)
    return LEVELS[max(2 - thirds, 0)]
