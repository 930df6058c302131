"""verl's data set, with a number of its own for every row."""

from collections.abc import Iterable

from verl.utils.dataset.rl_dataset import RLHFDataset

POSITION = "iapo_position"


class NumberedDataset(RLHFDataset):
    """`index` is extra_info.index, as verl's, if that numbers the rows; else the row's position among those read.

    The index is part of the seed of every rollout and orders the rows of a batch. Where it is missing, verl gives every
    row the same, 0, and prompts that should be sampled independently would share their random numbers.
    """

    def maybe_filter_out_long_prompts(self, dataframe=None):
        if not are_numbered(zip(*(column(dataframe, name) for name in ("data_source", "extra_info")), strict=True)):
            print(f"iapo: {self.original_data_files}: extra_info.index is missing or repeated; row numbers replace it")
            dataframe = dataframe.add_column(POSITION, list(range(len(dataframe))))
        return super().maybe_filter_out_long_prompts(dataframe)

    def __getitem__(self, item):
        row = super().__getitem__(item)
        if POSITION in row:
            row["index"] = row.pop(POSITION)
        return row


def column(dataframe, name: str) -> Iterable:
    return dataframe[name] if name in dataframe.column_names else [None] * len(dataframe)


def are_numbered(rows: Iterable[tuple[str | None, dict | None]]) -> bool:
    """Whether every row has an index, and no two of a split have the same.

    Args:
        rows: (data_source, extra_info) of each.
    """
    seen = set()
    for source, extra in rows:
        identity = (source, (extra or {}).get("split"), (extra or {}).get("index"))
        if identity[2] is None or identity in seen:
            return False
        seen.add(identity)
    return True
