"""From the hub or a local file to examples."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from iapo.data.originals import Original, Schema
from iapo.data.split import Example, Pair, unique, without
from iapo.tasks.reference import references

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
WHOLE = "all"  # the split of a local file with all rows
MOST_LISTED = 100  # rows with something to correct


def load_examples(
    name: str, original: Original, source: str | None, seed: int, unanswered: list[str] | None = None
) -> dict[str, list[Example]]:
    """The examples by split, distinct and disjoint; prints how many rows were left out, and contradictions.

    Args:
        unanswered: takes a line for each row that is left out because it has no answer that can be judged; without it
            such a row is an error.
    """
    splits, read, repeated, foreign = {}, 0, 0, 0
    contradictions: list[str] = []
    for split, rows in read_source(name, original, source).items():
        rows = _Counter(rows)
        where = source or original.hub_id
        where = where if split == WHOLE else f"{where} ({split})"
        lacking: list[tuple[int, str]] = []
        parsed = _Counter(parse_rows(rows, original, where, None if unanswered is None else lacking))
        pairs: list[Pair] = []
        splits[split] = list(islice(unique(parsed, pairs), original.limit))
        contradictions += (f"{_place(split, a)}, but {_place(split, b)}" for a, b in pairs)
        read += rows.count
        foreign += rows.count - parsed.count - len(lacking)
        repeated += parsed.count - len(splits[split])
        if unanswered is not None:
            unanswered += (f"{_row(split, index)}, {reason}" for index, reason in lacking)
    overlap = 0
    if original.evaluation:
        (test,) = splits.values()
        splits = {"test": test}
    elif len(splits) == 1:
        (examples,) = splits.values()
        train, test = original.divide(examples, seed)
        splits = {"train": train, "test": test}
    else:
        pairs = []
        train = list(without(splits["train"], splits["test"], pairs))
        contradictions += (f"{_place('train', a)}, but {_place('test', b)}" for a, b in pairs)
        overlap = len(splits["train"]) - len(train)
        splits["train"] = train
    if foreign:
        print(f"{name}: left out {foreign} of {read} rows, which have pictures or no final answer")
    train_too = "" if original.evaluation else f", and {overlap} train rows that are in test"
    print(f"{name}: dropped {repeated} repeated rows{train_too}")
    if contradictions:
        print(
            f"{name}: {len(contradictions)} of these have another answer than the row that was kept; correct the wrong "
            "one of the two:"
        )
        print_some(contradictions)
    return splits


def _place(split: str, example: Example) -> str:
    return f"{_row(split, example.index)}: {example.answer!r}"


def _row(split: str, index: int) -> str:
    return f"row {index}" if split == WHOLE else f"{split}, row {index}"


def print_some(lines: Sequence[str]) -> None:
    """A list, cut where it is long."""
    for line in lines[:MOST_LISTED]:
        print(f"  {line}")
    if len(lines) > MOST_LISTED:
        print(f"  and {len(lines) - MOST_LISTED} more")


class _Counter:
    """An iterable that knows how many items were taken from it."""

    def __init__(self, items: Iterable):
        self.items, self.count = items, 0

    def __iter__(self) -> Iterator:
        for item in self.items:
            self.count += 1
            yield item


# --- rows ---


def read_source(name: str, original: Original, source: str | None) -> dict[str, Iterable[dict]]:
    """Rows by split, from the hub or from a local file or directory."""
    path = Path(source) if source is not None else None
    if original.hub_id and (path is None or (not path.exists() and is_hub_id(source))):
        return read_hub(source or original.hub_id, original)
    if path is None or not path.exists():
        raise ValueError(f"source: {source!r} does not exist; give a file, a directory or a hub id.")
    whole = original.divide is not None or original.evaluation  # one file is enough
    if path.is_dir() and len(original.splits) == 2 and not (whole and len(_files(path)) == 1):
        return {split: read_file(_split_file(name, path, split)) for split in original.splits}
    if path.is_dir():
        return {WHOLE: read_file(_only_file(name, path, original.splits[0]))}
    if not whole:
        raise ValueError(f"source: {source!r} is a file; {name} needs a directory with one train* and one test* file.")
    if path.suffix not in SUFFIXES or not path.is_file():
        raise ValueError(f"source: {source!r} must be one file of type {', '.join(SUFFIXES)} for {name}.")
    return {WHOLE: read_file(path)}


def read_hub(hub_id: str, original: Original) -> dict[str, Iterable[dict]]:
    """The splits of a data set on the hub; where one is wanted and there is one of another name, that."""
    from datasets import config, load_dataset  # slow to import, and not needed for local files or the generated task

    offline = config.HF_HUB_OFFLINE
    no_answer = None if offline else hub_problem(config.HF_ENDPOINT)
    config.HF_HUB_OFFLINE = offline or no_answer is not None  # then only its cache is asked
    try:
        if len(original.splits) == 2:
            return {split: load_dataset(hub_id, original.config, split=split) for split in original.splits}
        found = load_dataset(hub_id, original.config)
    except Exception as error:  # the hub client raises a dozen unrelated types; the cause stays attached
        first = str(error).splitlines()[0] if str(error) else "no message"
        reason = no_answer or f"{type(error).__name__}: {first}"
        raise ValueError(
            f"source: {hub_id!r} can't be loaded from the hub ({reason}); check the id and the network, or give a "
            "local copy by --source PATH."
        ) from error
    finally:
        config.HF_HUB_OFFLINE = offline
    (wanted,) = original.splits
    if wanted not in found and len(found) != 1:
        raise ValueError(f"source: {hub_id!r} has the splits {', '.join(found)}, not {wanted!r}; give a local file.")
    split = wanted if wanted in found else next(iter(found))
    return {split: found[split]}


def hub_problem(endpoint: str) -> str | None:
    """Why the hub can't be reached, found by one request; its client would try for half a minute."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=10)  # with the user's proxy and certificates; any status is an answer
    except Exception as error:  # of whatever library its client uses
        return f"{endpoint} doesn't answer: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a name on the hub, organisation/name."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) is not None and not source.endswith(SUFFIXES)


def _split_file(name: str, directory: Path, split: str) -> Path:
    files = sorted(f for f in directory.glob(f"{split}*") if f.suffix in SUFFIXES)
    if len(files) != 1:
        raise ValueError(
            f"source: {str(directory)!r} has {len(files)} {split}* files; {name} needs a directory with one train* "
            f"and one test* file of type {', '.join(SUFFIXES)}."
        )
    return files[0]


def _files(directory: Path) -> list[Path]:
    return sorted(f for f in directory.glob("*") if f.suffix in SUFFIXES)


def _only_file(name: str, directory: Path, split: str) -> Path:
    """The one file in a directory, or of several the one that is named after the original's split."""
    files = _files(directory)
    for found in (files, [f for f in files if f.name.startswith(split)]):
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"source: {str(directory)!r} has {len(files)} files of type {', '.join(SUFFIXES)}; {name} needs one, give its "
        "path."
    )


def read_file(path: Path) -> Iterator[dict]:
    """The rows of a local file, lazily where the format allows it.

    Raises:
        ValueError: the file can't be read, has no rows, or is not what its name says.
    """
    empty = True
    read = {".parquet": _read_parquet, ".json": _read_json, ".csv": _read_csv}.get(path.suffix, _read_lines)
    try:
        if path.stat().st_size:  # nothing is neither JSON nor parquet
            for row in read(path):
                empty = False
                yield row
    except UnicodeDecodeError as error:
        raise ValueError(f"source: {str(path)!r} is no UTF-8 text ({error.reason}); convert it.") from error
    except OSError as error:
        raise ValueError(f"source: {str(path)!r} can't be read ({error.strerror or error}); check it.") from error
    if empty:
        raise ValueError(f"source: {str(path)!r} has no rows; give a file that has some.")


def _read_parquet(path: Path) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches()
    except pa.ArrowInvalid as error:
        raise ValueError(f"source: {str(path)!r} is no parquet file ({error}); give an intact one.") from error
    for batch in batches:
        yield from batch.to_pylist()


def _read_json(path: Path) -> Iterator[dict]:
    rows = _parse_json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"source: {str(path)!r} holds a {type(rows).__name__}; give a list of rows, or .jsonl.")
    yield from rows


def _read_lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parse_json(line, f"{path} line {number}")


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"source: {where} is not valid JSON ({error}); correct it.") from error


def _read_csv(path: Path) -> Iterator[dict]:
    """The first line names the columns; all values are text."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error("it has not as many cells as the first line")
                yield row
        except csv.Error as error:
            where = f"{path} line {reader.line_num}"
            raise ValueError(f"source: {where} is not valid CSV ({error}); correct it.") from error


# --- examples ---


class NoAnswer(ValueError):
    """A row has no reference answer that can be judged."""


def parse_rows(
    rows: Iterable[dict], original: Original, where: str, unanswered: list[tuple[int, str]] | None = None
) -> Iterator[Example]:
    """Examples in order, of the rows that belong to the data set.

    Args:
        unanswered: takes number and reason of each row that is left out because it has no answer that can be judged;
            without it such a row is an error.

    Raises:
        ValueError: a value is missing or can't be used; it names the row, from 0.
    """
    for index, row in enumerate(rows):
        schema = _schema(row, original, f"{where}, row {index}")
        try:
            if not original.keep(row):
                continue
            question, answer = schema.parse(row)
            question, answer = _text(question), _answer(answer)
            id = _text(row[original.id]) if original.id else None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if isinstance(error, NoAnswer) and unanswered is not None:
                unanswered.append((index, str(error)))
                continue
            reason = str(error) if isinstance(error, ValueError) else f"unexpected structure, {error!r}"
            raise ValueError(
                f"source: {where}, row {index} can't be parsed ({reason}); correct or remove it."
            ) from error
        yield Example(question, answer, index, id)


def _schema(row: object, original: Original, where: str) -> Schema:
    """The first schema whose columns the row has."""
    present = list(row) if isinstance(row, dict) else type(row).__name__
    for schema in original.schemas:
        if isinstance(row, dict) and all(column in row for column in schema.columns):
            return schema
    first = original.schemas[0].columns
    missing = next(column for column in first if not isinstance(row, dict) or column not in row)
    known = ", or ".join(str(list(schema.columns)) for schema in original.schemas)
    fix = f"give rows with {known}" if original.hub_id else "name its columns with --question and --answer"
    raise ValueError(f"source: {where} has no column {missing!r} but {present}; {fix}.")


def _text(value: object) -> str:
    known = isinstance(value, str | int | float) and not isinstance(value, bool)
    text = str(value).strip() if known else ""
    if text.casefold() in ("", "nan"):  # a missing text is read as NaN
        raise ValueError(f"{value!r} is no question or answer")
    return text


def _answer(value: object) -> str | list[str]:
    """Reference answers that can be judged; floats are written out in full, as `iapo.tasks.reference` does."""
    try:
        texts = references(value)
    except ValueError as error:
        raise NoAnswer(f"answer: {error}") from None
    return texts[0] if len(texts) == 1 else texts
