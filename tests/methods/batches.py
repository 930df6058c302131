"""Batches of completions for the tests of methods, and what one training step makes of them."""

import statistics
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from iapo.config import IapoConfig
from iapo.methods import Batch
from iapo.step import StepInputs, step_advantage


class Row(NamedTuple):
    """One completion in plain Python: what the independent implementations of the tests read."""

    group: int
    length: int
    correct: bool
    reward: float
    tokens: list[int]
    entropy: list[float]


def make_rows(groups, seed=0, longest=7, distinct=False) -> list[Row]:
    """Random completions; `groups` lists how many completions each prompt has, or which of them are correct.

    Args:
        distinct: no two completions of a group have the same length.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count, high):
        return torch.randint(0, high, (count,), generator=generator).tolist()

    rows = []
    for group, members in enumerate(groups):
        corrects = [bool(bit) for bit in draw(members, 2)] if isinstance(members, int) else list(members)
        count = len(corrects)
        lengths = torch.randperm(max(longest, count), generator=generator)[:count] if distinct else draw(count, longest)
        for correct, length in zip(corrects, [int(n) + 1 for n in lengths], strict=True):
            reward = (1.0 if correct else -1.0) + (0.5 if draw(1, 2)[0] else -0.5)
            entropy = (torch.rand(length, generator=generator) * 2).tolist()
            rows.append(Row(group, length, correct, reward, draw(length, 5), entropy))
    return rows


def make_batch(rows: list[Row], step: int = 1, extra: int = 0) -> Batch:
    """The rows as tensors, with rubbish on padding and `extra` columns of it."""
    T = max(row.length for row in rows) + extra
    tokens = torch.full((len(rows), T), 99)
    entropy = torch.full((len(rows), T), 7.0)
    mask = torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : row.length] = torch.tensor(row.tokens)
        entropy[i, : row.length] = torch.tensor(row.entropy)
        mask[i, : row.length] = 1
    return Batch(
        group=torch.tensor([row.group for row in rows]),
        rewards=torch.tensor([row.reward for row in rows]),
        response_mask=mask,
        step=step,
        correct=torch.tensor([row.correct for row in rows]),
        tokens=tokens,
        entropy=entropy,
    )


# Up to four prompts of one to six completions, short enough that ties and one-token responses are frequent.
row_lists = st.builds(
    make_rows, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 10**6), st.integers(1, 8)
)


def grpo_naive(groups, rewards, by_std=True) -> list[float]:
    """verl's GRPO advantage per completion: 0 where the rewards of a group are equal, and for one alone.

    Args:
        by_std: divide by the standard deviation of the group's rewards; Dr. GRPO doesn't.
    """
    result = []
    for group, reward in zip(groups, rewards, strict=True):
        members = [r for g, r in zip(groups, rewards, strict=True) if g == group]
        std = statistics.stdev(members) if len(members) > 1 else 0.0
        result.append((reward - statistics.mean(members)) / (std + 1e-6 if by_std else 1.0))
    return result


def step(method, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) advantages and loss mask of a batch with this method."""
    needed = {"correct": batch.correct, "tokens": batch.tokens, "entropy": batch.entropy}
    inputs = StepInputs(IapoConfig(), {"method": method}, batch.step, **needed)
    result = step_advantage(batch.rewards, batch.response_mask, batch.group.tolist(), inputs)
    return result.advantages, result.loss_mask
