"""Training and test data as verl reads it.

    iapo data NAME [--source FILE_OR_HUB_ID] [--format NAME] [--drop-unverifiable] [--out DIR] [--seed S]
    iapo data NAME --source FILE --question COLUMN --answer COLUMN

writes `DIR/NAME/train.parquet` and `DIR/NAME/test.parquet`. The first form takes one of

- `gsm8k`: openai/gsm8k, its own train and test split
- `math500`: HuggingFaceH4/MATH-500, split 80/20
- `dapo_math_17k`: BytedTsinghua-SIA/DAPO-Math-17k, its first 7,000 distinct questions, split 80/20
- `svamp`: ChilleD/SVAMP, its own train and test split; a file with all 1,000 rows is split 700/300 by a hash of `ID`.
  This split is ours: the authors' is not marked in their file
- `aime24`, `aime25`, `amc23`, `minerva`, `olympiadbench`: for evaluation, so only `test.parquet`; math-ai/aime24,
  math-ai/aime25, math-ai/amc23, math-ai/minervamath and the text-only problems of math-ai/olympiadbench
- `verbose_arithmetic`, `worked_sums`, `checked_registers`: the embedded tasks, generated, see `iapo.tasks.embedded`;
  also `validation.parquet`, on which to choose settings

`--source` names another hub id, or a local file with the original's columns (.parquet, .json, .jsonl, .csv), or a
directory that holds it; for gsm8k a directory with `train*` and `test*` files, which svamp takes too.

The second form reads data of your own under a NAME that you choose: any file of these types, split 80/20, or a
directory with `train*` and `test*`. An answer is a number, a text, or a list of these, any of which is right.

A question is once in a split, and never in two. Questions are compared without regard to case and to how much white
space there is. The first occurrence is kept, and the test split keeps what both splits have. Rows that were left out
and have another answer are listed.

Reference answers that the verifier can't read are listed: any other spelling of such an answer is judged wrong.
`--drop-unverifiable` leaves these rows out, and those without an answer, which are an error otherwise.
"""

import os
import random
import re
import shlex
import sys
import warnings
from pathlib import Path

from iapo.answer_format import FORMATS
from iapo.arguments import Parser, obstacle
from iapo.data.judge import unreadable
from iapo.data.originals import EVALUATION, NAMES, ORIGINALS, own
from iapo.data.read import load_examples, print_some
from iapo.data.split import Example
from iapo.data.write import to_rows, write_parquets
from iapo.tasks.embedded import TASKS, Problem

__all__ = ["EVALUATION", "INSTRUCTION", "NAMES", "default_dir", "generate", "main", "prepare", "write_parquets"]

INSTRUCTION = FORMATS["tags"].instruction
TRAIN_SIZE, TEST_SIZE, VALIDATION_SIZE = 4096, 256, 256
MOST_GENERATED = 1_000_000  # of 99^4 problems or more, so that drawing distinct ones stays quick


def default_dir() -> Path:
    """Where data sets are, and models in its folder `models`: $IAPO_DATA_DIR, or data.

    Raises:
        ValueError: the variable is empty, which would be the current folder.
    """
    named = os.environ.get("IAPO_DATA_DIR", "data")
    if not named:
        raise ValueError("IAPO_DATA_DIR: '' names no folder; set the variable to one, or unset it.")
    return Path(named)


def prepare(
    name: str,
    out_dir: str | Path = "data",
    source: str | None = None,
    seed: int = 0,
    train_size: int | None = None,
    test_size: int | None = None,
    question: str | None = None,
    answer: str | None = None,
    drop_unverifiable: bool = False,
    format: str = "tags",
) -> dict[str, Path]:
    """Write `out_dir/name/{train,test}.parquet`, or those of them that the data set has; return the paths by split.

    Args:
        name: one of `NAMES`, or with `question` and `answer` any other.
        out_dir: made if it does not exist.
        source: of the real data sets; by default the hub.
        seed: of the 80/20 split or the generated problems.
        train_size: of an embedded task, by default 4096.
        test_size: of an embedded task, by default 256.
        question: the column of the questions, for data of the user's own.
        answer: the column of the answers, for data of the user's own.
        drop_unverifiable: leave out the rows without a reference answer that the verifier can read.
        format: of `iapo.answer_format`; its instruction is added to each question, except in the embedded tasks.

    Raises:
        ValueError: an unknown name, an impossible size, or data that can't be used; in one line.
        ImportError: a package that this data set needs is not installed.
    """
    _check_name(name, source, question, answer)
    _check_not_overwritten(source, Path(out_dir) / name)
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} must be one of {', '.join(FORMATS)}.")
    if seed < 0:  # Python's generator would take its absolute value
        raise ValueError(f"seed: {seed} must be a whole number of at least 0.")
    for field, value in (("train_size", train_size), ("test_size", test_size)):
        if value is not None and not 1 <= value <= MOST_GENERATED:
            raise ValueError(f"{field}: {value} must be from 1 to {MOST_GENERATED}.")
    if name in TASKS:
        other = format if format != "tags" else None  # the embedded models know their format without being told
        _warn_if_set(name, source=source, drop_unverifiable=drop_unverifiable or None, format=other)
        instruction = ""
        splits = generate(name, train_size or TRAIN_SIZE, test_size or TEST_SIZE, seed)
    else:
        _warn_if_set(name, train_size=train_size, test_size=test_size)
        instruction = FORMATS[format].instruction
        unanswered: list[str] | None = [] if drop_unverifiable else None
        splits = load_examples(name, ORIGINALS.get(name) or own(question, answer), source, seed, unanswered)
        splits = _judged(name, splits, unanswered)
    for split, examples in splits.items():
        if not examples:
            raise ValueError(f"source: {source or name!r} leaves no rows for {split}; give a larger one.")
    paths = {split: Path(out_dir) / name / f"{split}.parquet" for split in splits}
    write_parquets({paths[split]: to_rows(splits[split], name, split, instruction) for split in splits})
    for split, path in paths.items():
        print(f"{name}: wrote {len(splits[split])} rows to {path}")
    if name not in NAMES:
        print(f"{name}: train on it with {shlex.quote(f'data={Path(out_dir, name)}')}")
    return paths


def _check_name(name: str, source: str | None, question: str | None, answer: str | None) -> None:
    if question is None and answer is None:
        if name not in NAMES:
            raise ValueError(
                f"name: {name!r} must be one of {', '.join(NAMES)}; for data of your own give --question and --answer."
            )
        return
    if name in NAMES:
        raise ValueError(f"name: {name!r} has columns of its own; choose another, or omit --question and --answer.")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name: {name!r} must be letters, digits, '_', '-' and '.'; it names a folder.")
    for field, value in (("question", question), ("answer", answer), ("source", source)):
        if not value:
            raise ValueError(f"{field}: missing; data of your own needs --source, --question and --answer.")


def _check_not_overwritten(source: str | None, folder: Path) -> None:
    """A user's own originals, and the set that is made of them, may both be data/NAME/train.parquet."""
    for path in [folder.resolve() / f"{split}.parquet" for split in ("train", "test", "validation")]:
        if source and path.exists() and Path(source).resolve() in (path, path.parent):
            raise ValueError(
                f"source: {source!r} would be overwritten, because the set is written to {folder}; choose another "
                "--out or name."
            )


def _warn_if_set(name: str, **options: object) -> None:
    for option, value in options.items():
        if value is not None:
            warnings.warn(f"{option}={value!r} has no effect on {name}.", stacklevel=3)


def _judged(name: str, splits: dict[str, list[Example]], unanswered: list[str] | None) -> dict[str, list[Example]]:
    """The examples, without those whose answer can't be read if they are to be dropped; lists these.

    Args:
        unanswered: a line for each row that was dropped already; None: nothing is to be dropped.
    """
    found = {split: unreadable(examples) for split, examples in splits.items()}
    for split, bad in found.items():
        if bad and len(bad) == len(splits[split]):
            raise ValueError(
                f"answer: the verifier can read none of the {len(bad)} reference answers of {split}, the first is "
                f"{bad[0].answer!r} of row {bad[0].index}; give numbers, LaTeX or words."
            )
    listed = [f"{split}, row {example.index}: {example.answer!r}" for split, bad in found.items() for example in bad]
    listed = [*(unanswered or ()), *listed]
    total = sum(map(len, splits.values())) + len(unanswered or ())
    if not listed:
        print(f"{name}: the verifier can read all {total} reference answers")
        return splits
    if unanswered is not None:
        print(f"{name}: dropped {len(listed)} of {total} rows, without a reference answer that the verifier can read:")
    else:
        print(
            f"{name}: the verifier can't read {len(listed)} of {total} reference answers, so any other spelling of "
            "them is judged wrong; --drop-unverifiable leaves these rows out:"
        )
    print_some(listed)
    if unanswered is None:
        return splits
    dropped = {split: {example.index for example in bad} for split, bad in found.items()}
    return {split: [e for e in examples if e.index not in dropped[split]] for split, examples in splits.items()}


def generate(name: str, train_size: int, test_size: int, seed: int) -> dict[str, list[Example]]:
    """Distinct problems of an embedded task by split. The salt makes no seed repeat the problems of fine-tuning.

    The validation split is drawn last, so it changes nothing in the others.
    """
    task, rng = TASKS[name], random.Random(f"{name} data {seed}")
    problems: dict[Problem, None] = {}  # an ordered set
    end_of_train = test_size + train_size
    while len(problems) < end_of_train + VALIDATION_SIZE:
        problems[task.sample_problem(rng)] = None
    examples = [Example(task.prompt(p), task.answer(p), i) for i, p in enumerate(problems)]
    return {
        "train": examples[test_size:end_of_train],
        "test": examples[:test_size],
        "validation": examples[end_of_train:],
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 written, 2 nothing written, with the reason in one line."""
    parser = Parser(prog="iapo data", description="Write train.parquet and test.parquet for verl.")
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(NAMES)}; or a name for data of your own")
    parser.add_argument("--source", help="local file or directory, or hub id (default: the original on the hub)")
    parser.add_argument("--question", metavar="COLUMN", help="of your own data: the column of the questions")
    parser.add_argument("--answer", metavar="COLUMN", help="of your own data: the column of the answers")
    parser.add_argument(
        "--drop-unverifiable", action="store_true", help="leave out rows without an answer that the verifier can read"
    )
    parser.add_argument("--format", default="tags", help=f"asked of answers: {', '.join(FORMATS)} (default tags)")
    # By default where iapo train looks.
    parser.add_argument("--out", help="directory in which NAME/ is made (default $IAPO_DATA_DIR, or data)")
    parser.add_argument("--seed", type=int, default=0, help="of the 80/20 split or the generated problems (default 0)")
    parser.add_argument("--train-size", type=int, help=f"embedded tasks only (default {TRAIN_SIZE})")
    parser.add_argument("--test-size", type=int, help=f"embedded tasks only (default {TEST_SIZE})")
    options = vars(parser.parse_args(arguments))
    out_dir = options.pop("out")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of source code
    try:
        if out_dir == "":
            raise ValueError("--out: '' names no folder; give one, or leave it out.")
        out_dir = out_dir or default_dir()
        if reason := obstacle(Path(out_dir)):  # before the data is read, which may take minutes
            raise ValueError(f"--out: {out_dir} {reason}; choose another folder.")
        prepare(out_dir=out_dir, **options)
        return 0
    except ValueError as error:
        print(f"iapo.data: {error}", file=sys.stderr)
    except ImportError as error:
        lacking = f"{error.name} is not installed" if error.name else str(error).partition(";")[0]
        print(
            f"iapo.data: packages: {lacking}; set up with bash scripts/setup.sh cpu (or gpu), or run pip install "
            "pyarrow datasets pebble math-verify==0.8.0.",
            file=sys.stderr,
        )
    except OSError as error:
        reason = error.strerror or error
        print(f"iapo.data: --out: '{out_dir}' can't be written to ({reason}); choose another folder.", file=sys.stderr)
    return 2
