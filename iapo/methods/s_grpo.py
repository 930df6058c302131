"""S-GRPO: a loss on part of the tokens, drawn at random (Lee and Tong, arXiv 2504.20834)."""

import hashlib
from dataclasses import dataclass

import torch

from iapo.methods.base import Batch, Method, number


@dataclass
class SGrpo(Method):
    """Stochastic GRPO: only a subset of a completion's tokens has a loss, of whatever kind.

        token t is kept    for t <= always,    with probability p for always < t <= until,    never behind

    with t counted from 1 (the paper's alpha, k and P). A completion of at most `always` tokens is kept whole; if no
    token of the batch is kept, all advantages are 0.

    The draw is a function of the seed, the training step and the completion's tokens alone: a resumed run repeats it,
    and it depends neither on padding nor on the other completions nor on their order. Two completions of a step with
    the same tokens therefore keep the same ones.

    Differences: no code of the authors' was found, and of the paper the full text was not at hand. The defaults, 150,
    341 and 0.5, are those of the baseline of IAPO's released command; the recipe takes 3/10 and 2/3 of the response
    budget, as they are 0.29 and 2/3 of 512. That baseline takes the mean over each completion's kept tokens first, here
    it is over all kept tokens, as for the other methods. And it draws tokens only in completions of fewer than `until`;
    the others keep the first `always` alone.

    Attributes:
        always: leading tokens that are always kept.
        until: last token that may be kept.
        p: probability of those in between.
        seed: of the draw.
    """

    always: int = 150
    until: int = 341
    p: float = 0.5
    seed: int = 0

    needs = ("tokens",)

    def __post_init__(self):
        number("always", self.always, whole=True)
        number("until", self.until, low=max(self.always, 1), whole=True)
        number("p", self.p, high=1)
        number("seed", self.seed, whole=True)
        if self.always == 0 and self.p == 0:
            raise ValueError("p: 0 with always=0 keeps no token; raise one of them.")

    def problems(self, rollouts: int, max_response_length: int):
        if self.always >= max_response_length:
            budget = f"data.max_response_length={max_response_length}"
            yield f"always: {self.always} of {budget} keeps every token; lower it."

    def loss_mask(self, batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
        kept_BT = torch.zeros(batch.response_mask.shape, dtype=torch.bool)
        for i, length in enumerate(batch.response_mask.sum(1).tolist()):
            kept_BT[i, :length] = torch.rand(length, generator=self._generator(batch, i, length)) < self.p
        kept_BT[:, : self.always] = True
        kept_BT[:, self.until :] = False
        return kept_BT & batch.response_mask.bool()

    def _generator(self, batch: Batch, row: int, length: int) -> torch.Generator:
        key = torch.tensor([self.seed, batch.step, *batch.tokens[row, :length].tolist()], dtype=torch.int64)
        digest = hashlib.blake2b(key.numpy().tobytes(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
