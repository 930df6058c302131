"""S-GRPO: a loss on part of the tokens, drawn at random (Lee and Tong, arXiv 2504.20834)."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from iapo.methods.base import Batch, Method, check_number


@dataclass
class SGrpo(Method):
    """Stochastic GRPO: only some of a completion's tokens have a loss of any kind.

        token t, counted from 1, is kept      for t <= always
                                              with probability p for always < t <= until
                                              never for t > until

    The draw is a function of the seed, the training step and the completion's tokens alone. So a resumed run repeats
    it, and it does not depend on padding, on the other completions or on their order. Two completions of a step with
    the same tokens keep the same ones.

    Source: arXiv 2504.20834; the full text was not available. always, until and p are the paper's alpha, k and P.

    Degenerate cases: a completion of at most `always` tokens is kept whole. If no token of the batch is kept, all
    advantages are 0.

    Differences: no code of the authors was found. The defaults, 150, 341 and 0.5, are those of the S-GRPO baseline in
    IAPO's released command. They are 0.29 and 2/3 of its 512 tokens, so the recipe takes 3/10 and 2/3 of the response
    budget. That baseline takes the mean over each completion's kept tokens first; here the mean is over all kept
    tokens, as for the other methods. And it draws tokens only in completions of fewer than `until` tokens; the others
    keep the first `always` alone.

    Attributes:
        always: the number of leading tokens that are always kept.
        until: the last token that may be kept.
        p: the probability of those in between.
        seed: of the draw.
    """

    always: int = 150
    until: int = 341
    p: float = 0.5
    seed: int = 0

    needs = ("tokens",)

    def __post_init__(self) -> None:
        check_number("always", self.always, whole=True)
        check_number("until", self.until, low=max(self.always, 1), whole=True)
        check_number("p", self.p, high=1)
        check_number("seed", self.seed, whole=True)
        if self.always == 0 and self.p == 0:
            raise ValueError("p: 0 with always=0 keeps no token; raise one of them.")

    def problems(self, rollouts: int, max_response_length: int) -> Iterator[str]:
        if self.always >= max_response_length:
            budget = f"data.max_response_length={max_response_length}"
            yield f"always: {self.always} of {budget} keeps every token; lower it."

    def loss_mask(self, batch: Batch, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept_BT = torch.zeros(batch.response_mask.shape, dtype=torch.bool)
        for i, length in enumerate(batch.response_mask.sum(1).tolist()):
            kept_BT[i, :length] = torch.rand(length, generator=self._generator(batch, i, length)) < self.p
        kept_BT[:, : self.always] = True
        kept_BT[:, self.until :] = False
        return kept_BT & batch.response_mask.bool()

    def _generator(self, batch: Batch, row: int, length: int) -> torch.Generator:
        tokens = batch.needed("tokens")[row, :length].tolist()
        key = torch.tensor([self.seed, batch.step, *tokens], dtype=torch.int64)
        digest = hashlib.blake2b(key.numpy().tobytes(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
