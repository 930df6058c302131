"""Training and test data as verl reads it.

    iapo data NAME [--source FILE_OR_HUB_ID] [--out DIR] [--seed S]

writes `DIR/NAME/train.parquet` and `DIR/NAME/test.parquet`. For verbose_arithmetic it also writes
`validation.parquet`, on which to choose settings. NAME is one of

- `gsm8k`: openai/gsm8k, its own train and test split
- `math500`: HuggingFaceH4/MATH-500, split 80/20
- `dapo_math_17k`: BytedTsinghua-SIA/DAPO-Math-17k, its first 7,000 distinct questions, split 80/20
- `verbose_arithmetic`: generated, see `iapo.tasks.verbose_arithmetic`

`--source` names another hub id, or a local file with the same columns (.parquet, .json, .jsonl); for gsm8k a
directory with `train*` and `test*` files.

A question is once in a split, and never in two. Questions are compared without regard to case and to how much white
space there is. The first occurrence is kept, and the test split keeps what both splits have.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from iapo.answer_format import ANSWER, ANSWER_END, EXIT_MARKER, THINK, written
from iapo.tasks import verbose_arithmetic
from iapo.tasks.reference import references

INSTRUCTION = (
    f"Reason within {THINK} {EXIT_MARKER}, then give only the final answer within {ANSWER} {ANSWER_END}. "
    f"Your whole reply must have exactly this form:\n{written(' ... ', ' ... ')}"
)
TEST_FRACTION = 0.2
TRAIN_SIZE, TEST_SIZE, VALIDATION_SIZE = 4096, 256, 256
MOST_GENERATED = 1_000_000  # of 99^4 problems, so that drawing distinct ones stays quick
SUFFIXES = (".parquet", ".json", ".jsonl")

DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'


@dataclass(frozen=True)
class Example:
    """A question, its reference answer, and its row number in the source."""

    question: str
    answer: str
    index: int


# --- from a row of the original to (question, answer) ---


def parse_gsm8k(row: dict) -> tuple[str, str]:
    """The answer is after the last `####`; thousands separators are removed: `#### 1,080` gives "1080"."""
    _, marker, final = row["answer"].rpartition("####")
    if not marker:
        raise ValueError(f"answer: {row['answer']!r} has no '####'")
    return row["question"], re.sub(r"(?<=\d),(?=\d{3})", "", final)


def parse_math500(row: dict) -> tuple[str, str]:
    return row["problem"], row["answer"]


def parse_dapo(row: dict) -> tuple[str, str]:
    """The question without the instructions around it: they ask for another answer format."""
    content = row["prompt"][0]["content"]
    if not (content.startswith(DAPO_PREFIX) and content.endswith(DAPO_SUFFIX)):
        raise ValueError(f"prompt: {content!r} lacks the data set's fixed first and last sentence")
    return content[len(DAPO_PREFIX) : -len(DAPO_SUFFIX)], row["reward_model"]["ground_truth"]


@dataclass(frozen=True)
class Dataset:
    """Where a data set comes from and how its rows are read.

    `splits` are the hub's: train and test, or a single one, which is split here.
    """

    hub_id: str
    config: str | None
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    parse: Callable[[dict], tuple[str, str]]
    instruction: str = INSTRUCTION
    limit: int | None = None


DATASETS = {
    "gsm8k": Dataset("openai/gsm8k", "main", ("train", "test"), ("question", "answer"), parse_gsm8k),
    "math500": Dataset("HuggingFaceH4/MATH-500", None, ("test",), ("problem", "answer"), parse_math500),
    "dapo_math_17k": Dataset(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        None,
        ("train",),
        ("prompt", "reward_model"),
        parse_dapo,
        limit=7000,
    ),
}
NAMES = (*DATASETS, "verbose_arithmetic")


# --- reading ---


def read_file(path: Path) -> Iterator[dict]:
    """The rows of a local file, lazily where the format allows it."""
    if path.suffix == ".parquet":
        try:
            batches = pq.ParquetFile(path).iter_batches()
        except pa.ArrowInvalid as error:
            raise ValueError(f"source: {str(path)!r} is no parquet file ({error}); give an intact one.") from error
        for batch in batches:
            yield from batch.to_pylist()
    elif path.suffix == ".json":
        rows = _parse_json(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(rows, list):
            raise ValueError(f"source: {str(path)!r} holds a {type(rows).__name__}; give a list of rows, or .jsonl.")
        yield from rows
    else:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse_json(line, f"{path} line {number}")


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"source: {where} is not valid JSON ({error}); correct it.") from error


def read_hub(hub_id: str, dataset: Dataset) -> dict[str, Iterable[dict]]:
    from datasets import load_dataset  # slow to import, and not needed for local files or the generated task

    try:
        return {split: load_dataset(hub_id, dataset.config, split=split) for split in dataset.splits}
    except Exception as error:  # the hub client raises a dozen unrelated types; the cause stays attached
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise ValueError(
            f"source: {hub_id!r} can't be loaded from the hub ({reason}); check the id and the network, or give a "
            "local file."
        ) from error


def read_source(name: str, source: str | None) -> dict[str, Iterable[dict]]:
    """Rows by split, from the hub or from a local file or directory."""
    dataset = DATASETS[name]
    path = Path(source) if source is not None else None
    if path is None or (not path.exists() and _is_hub_id(source)):
        return read_hub(source or dataset.hub_id, dataset)
    if not path.exists():
        raise ValueError(f"source: {source!r} does not exist; give a file, a directory or a hub id.")
    if len(dataset.splits) == 1:
        if path.suffix not in SUFFIXES or not path.is_file():
            raise ValueError(f"source: {source!r} must be one file of type {', '.join(SUFFIXES)} for {name}.")
        return {dataset.splits[0]: read_file(path)}
    return {split: read_file(_split_file(name, path, split)) for split in dataset.splits}


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None and not source.endswith(SUFFIXES)


def _split_file(name: str, directory: Path, split: str) -> Path:
    if not directory.is_dir():
        raise ValueError(
            f"source: {str(directory)!r} is a file; {name} needs a directory with one train* and one test* file."
        )
    files = sorted(f for f in directory.glob(f"{split}*") if f.suffix in SUFFIXES)
    if len(files) != 1:
        raise ValueError(
            f"source: {str(directory)!r} has {len(files)} {split}* files; {name} needs a directory with one train* "
            f"and one test* file of type {', '.join(SUFFIXES)}."
        )
    return files[0]


def parse_rows(rows: Iterable[dict], dataset: Dataset, where: str) -> Iterator[Example]:
    """Examples in order.

    Raises:
        ValueError: a value is missing or can't be used; it names the row, from 0.
    """
    for index, row in enumerate(rows):
        present = list(row) if isinstance(row, dict) else type(row).__name__
        for column in dataset.columns:
            if column not in present:
                raise ValueError(
                    f"source: {where}, row {index} has no column {column!r} but {present}; give rows with "
                    f"{list(dataset.columns)}."
                )
        try:
            question, answer = dataset.parse(row)
            question, answer = _text(question), _answer(answer)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"unexpected structure, {error!r}"
            raise ValueError(
                f"source: {where}, row {index} can't be parsed ({reason}); correct or remove it."
            ) from error
        yield Example(question, answer, index)


def _text(value: object) -> str:
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    if not text:
        raise ValueError(f"{value!r} is no question or answer")
    return text


def _answer(value: object) -> str:
    """A reference answer that can be judged; floats are written out in full, as `iapo.tasks.reference` does."""
    if isinstance(value, float) and math.isfinite(value):
        return references(value)[0]
    text = _text(None if isinstance(value, float) else value)
    try:
        return references(text)[0]
    except ValueError as error:
        raise ValueError(f"answer: {error}") from None


# --- de-duplicating and splitting ---


def normalise(question: str) -> str:
    return " ".join(question.split()).casefold()


def unique(examples: Iterable[Example]) -> Iterator[Example]:
    """The first example of every question."""
    seen = set()
    for example in examples:
        key = normalise(example.question)
        if key not in seen:
            seen.add(key)
            yield example


def without(examples: list[Example], others: list[Example]) -> list[Example]:
    """The examples whose question is not among the others'."""
    taken = {normalise(other.question) for other in others}
    return [example for example in examples if normalise(example.question) not in taken]


def split_randomly(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Train and test, in the source's order; the test split has TEST_FRACTION of the examples, rounded."""
    test = set(random.Random(seed).sample(range(len(examples)), round(TEST_FRACTION * len(examples))))
    return (
        [example for i, example in enumerate(examples) if i not in test],
        [example for i, example in enumerate(examples) if i in test],
    )


def load_examples(name: str, source: str | None, seed: int) -> tuple[list[Example], list[Example]]:
    """Train and test examples of a data set, distinct and disjoint; prints how many rows were dropped."""
    dataset = DATASETS[name]
    splits, read = {}, 0
    for split, rows in read_source(name, source).items():
        counted = _Counter(parse_rows(rows, dataset, f"{source or dataset.hub_id} ({split})"))
        splits[split] = list(islice(unique(counted), dataset.limit))
        read += counted.count
    repeated = read - sum(map(len, splits.values()))
    overlap = 0
    if len(dataset.splits) == 1:
        train, test = split_randomly(splits[dataset.splits[0]], seed)
    else:
        train, test = without(splits["train"], splits["test"]), splits["test"]
        overlap = len(splits["train"]) - len(train)
    print(f"{name}: dropped {repeated} repeated rows, and {overlap} train rows that are in test")
    return train, test


class _Counter:
    """An iterable that knows how many items were taken from it."""

    def __init__(self, items: Iterable):
        self.items, self.count = items, 0

    def __iter__(self) -> Iterator:
        for item in self.items:
            self.count += 1
            yield item


def generate_verbose_arithmetic(train_size: int, test_size: int, seed: int) -> dict[str, list[Example]]:
    """Distinct problems by split. The salt makes no seed repeat the problems of the model's fine-tuning.

    The validation split is drawn last, so it changes nothing in the others.
    """
    rng = random.Random(f"verbose_arithmetic data {seed}")
    problems: dict[tuple[int, ...], None] = {}  # an ordered set
    end_of_train = test_size + train_size
    while len(problems) < end_of_train + VALIDATION_SIZE:
        problems[verbose_arithmetic.sample_problem(rng)] = None
    examples = [Example(verbose_arithmetic.prompt(p), verbose_arithmetic.answer(p), i) for i, p in enumerate(problems)]
    return {
        "train": examples[test_size:end_of_train],
        "test": examples[:test_size],
        "validation": examples[end_of_train:],
    }


# --- writing ---


def to_row(example: Example, name: str, split: str, instruction: str) -> dict:
    """A row of the schema that verl's RLHFDataset and reward managers read."""
    content = f"{example.question}\n\n{instruction}" if instruction else example.question
    return {
        "data_source": name,
        "prompt": [{"role": "user", "content": content}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": example.answer},
        "extra_info": {"split": split, "index": example.index},
    }


def write_parquets(tables: dict[Path, list[dict]]) -> None:
    """Write all files, or none: complete files are written under other names and then renamed."""
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


def prepare(
    name: str,
    out_dir: str | Path = "data",
    source: str | None = None,
    seed: int = 0,
    train_size: int | None = None,
    test_size: int | None = None,
) -> dict[str, Path]:
    """Write `out_dir/name/{train,test}.parquet`, and verbose_arithmetic's validation; return the paths by split.

    Args:
        name: one of `NAMES`.
        out_dir: made if it does not exist.
        source: of the real data sets; by default the hub.
        seed: of the 80/20 split or the generated problems.
        train_size: of verbose_arithmetic, by default 4096.
        test_size: of verbose_arithmetic, by default 256.

    Raises:
        ValueError: an unknown name, an impossible size, or data that can't be used; in one line.
    """
    if name not in NAMES:
        raise ValueError(f"name: {name!r} must be one of {', '.join(NAMES)}.")
    for field, value in (("train_size", train_size), ("test_size", test_size)):
        if value is not None and not 1 <= value <= MOST_GENERATED:
            raise ValueError(f"{field}: {value} must be from 1 to {MOST_GENERATED}.")
    if name == "verbose_arithmetic":
        _warn_if_set(name, source=source)
        instruction = ""
        examples = generate_verbose_arithmetic(train_size or TRAIN_SIZE, test_size or TEST_SIZE, seed)
    else:
        _warn_if_set(name, train_size=train_size, test_size=test_size)
        instruction = DATASETS[name].instruction
        train, test = load_examples(name, source, seed)
        examples = {"train": train, "test": test}
    paths = {split: Path(out_dir) / name / f"{split}.parquet" for split in examples}
    for split, rows in examples.items():
        if not rows:
            raise ValueError(f"source: {source or name!r} leaves no rows for {split}; give a larger one.")
    write_parquets({paths[s]: [to_row(e, name, s, instruction) for e in examples[s]] for s in examples})
    for split, path in paths.items():
        print(f"{name}: wrote {len(examples[split])} rows to {path}")
    return paths


def _warn_if_set(name: str, **options: object) -> None:
    for option, value in options.items():
        if value is not None:
            warnings.warn(f"{option}={value!r} has no effect on {name}.", stacklevel=3)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 written, 2 nothing written, with the reason in one line."""
    parser = argparse.ArgumentParser(prog="iapo data", description="Write train.parquet and test.parquet for verl.")
    parser.add_argument("name", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--source", help="local file or directory, or hub id (default: the original on the hub)")
    out = os.environ.get("IAPO_DATA_DIR", "data")  # where iapo.train looks
    parser.add_argument("--out", default=out, help="directory in which NAME/ is made (default $IAPO_DATA_DIR, or data)")
    parser.add_argument("--seed", type=int, default=0, help="of the 80/20 split or the generated problems (default 0)")
    parser.add_argument("--train-size", type=int, help=f"verbose_arithmetic only (default {TRAIN_SIZE})")
    parser.add_argument("--test-size", type=int, help=f"verbose_arithmetic only (default {TEST_SIZE})")
    options = parser.parse_args(arguments)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of source code
    try:
        prepare(options.name, options.out, options.source, options.seed, options.train_size, options.test_size)
        return 0
    except ValueError as error:
        print(f"iapo.data: {error}", file=sys.stderr)
    except OSError as error:
        print(
            f"iapo.data: --out: {options.out!r} can't be written to ({error}); choose another folder.", file=sys.stderr
        )
    return 2


if __name__ == "__main__":
    sys.exit(main())
