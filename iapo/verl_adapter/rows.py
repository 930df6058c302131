"""The rows of a batch in TransferQueue, one per completion: fetched and put, ordered, and what their fields hold."""

from collections.abc import Sequence

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta


def fetch(batch: KVBatchMeta, fields: list[str]) -> TensorDict:
    """The `fields` of every row of `batch`.

    Raises:
        RuntimeError: TransferQueue lacks some of the fields or rows, which it leaves out in silence.
    """
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    missing = [name for name in fields if name not in data]
    if missing:
        raise RuntimeError(f"TransferQueue holds no {', '.join(missing)} for partition {batch.partition_id!r}.")
    if len(data) != len(batch.keys):
        raise RuntimeError(
            f"TransferQueue holds {len(data)} of {len(batch.keys)} rows of partition {batch.partition_id!r}."
        )
    return data


def put(batch: KVBatchMeta, **fields) -> None:
    """Replace `fields` of every row of `batch`, or add them."""
    data = TensorDict(fields, batch_size=len(batch))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=data)


def pad_with_last(nested: torch.Tensor) -> torch.Tensor:
    """(B, max length) from a jagged tensor; a row is filled up with its last value."""
    rows = nested.unbind()
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row[-1].expand(width - len(row))]) for row in rows])


def reward_infos(data: TensorDict) -> list[dict]:
    """What the reward function returned for each row, from TransferQueue's `extra_fields`."""
    return [getattr(extra, "data", extra).get("reward_extra_info", {}) for extra in data["extra_fields"]]


def correctness(infos: list[dict]) -> torch.Tensor:
    """(B,) bool, by the reward's `acc`: the correctness signal, not the sign of a shaped reward.

    Raises:
        ValueError: the reward function returns none.
    """
    if any("acc" not in info for info in infos):
        raise ValueError(
            "reward: the reward function returns no 'acc' (1 if the answer is right, else 0), which iapo.beta, "
            "iapo.rho, iapo.gate=correct and most methods need; return it or set them to 0, 0, 'all' and none."
        )
    return torch.tensor([float(info["acc"]) for info in infos]) > 0.5


def order_rows(batch: KVBatchMeta, index) -> list[int]:
    """By prompt and rollout number: the buffer's own order is that of random ids, which would change rounding.

    Returns:
        The old place of each row.
    """
    prompts = [str(getattr(i, "data", i)) for i in index]
    order = sorted(range(len(batch)), key=lambda i: (prompts[i], int(batch.keys[i].split("_")[1])))
    batch.reorder(order)
    return order


def joined(answers: Sequence[torch.Tensor]) -> torch.Tensor:
    """One row of TransferQueue from the tokens of several answers: each after its length."""
    return torch.cat([torch.cat([torch.tensor([len(answer)]), answer]) for answer in answers])


def separated(row: torch.Tensor) -> list[torch.Tensor]:
    """The inverse of `joined`."""
    answers = []
    while len(row):
        length = int(row[0])
        answers.append(row[1 : 1 + length])
        row = row[1 + length :]
    return answers


def jagged(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of rows of different lengths, as TransferQueue holds them."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
