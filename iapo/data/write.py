"""Rows as verl reads them, in parquet files."""

import os
from pathlib import Path

from iapo.data.split import Example


def to_rows(examples: list[Example], name: str, split: str, instruction: str) -> list[dict]:
    """Rows of the schema that verl's RLHFDataset and reward managers read.

    A parquet column has one type: where an example has several answers, all are lists.
    """
    lists = any(isinstance(example.answer, list) for example in examples)
    return [
        {
            "data_source": name,
            "prompt": [{"role": "user", "content": "\n\n".join(filter(None, (example.question, instruction)))}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": example.answers if lists else example.answer},
            "extra_info": {"split": split, "index": example.index},
        }
        for example in examples
    ]


def write_parquets(tables: dict[Path, list[dict]]) -> None:
    """Write all files, or none: complete files are written under other names and then renamed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in tables}
    try:
        for path, rows in tables.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), temporary[path])
        for path in tables:
            os.replace(temporary[path], path)
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)
