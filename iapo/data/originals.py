"""The data sets: where each comes from, which columns it has, and what a row of it says.

Several copies of a data set are common, with columns of other names. A `Schema` is one form; a row is read by the first
schema whose columns it has. Where the columns come from:

- GSM8K, MATH-500, DAPO-Math-17k: the hub's openai/gsm8k, HuggingFaceH4/MATH-500, BytedTsinghua-SIA/DAPO-Math-17k.
- SVAMP (arXiv 2103.07191): `SVAMP.json` of github.com/arkilpatel/SVAMP, with numbers as answers; the hub's
  ChilleD/SVAMP has the same columns, with text as answers, and the split into 700 and 300.
- AIME, AMC, Minerva: math-ai on the hub. Its aime24 has the answer in the box of `solution`, aime25 `problem` and
  `answer`, amc23 and minervamath `question` and `answer`. HuggingFaceH4/aime_2024 has `problem` and `answer`,
  Maxwell-Jia/AIME_2024 `Problem` and `Answer`, AI-MO/aimo-validation-amc floats. Minerva's own rows (arXiv 2206.14858)
  are `problem` and a `solution` with a box.
- OlympiadBench (arXiv 2402.14008): the README of github.com/OpenBMB/OlympiadBench. The hub's math-ai/olympiadbench and
  Hothan/OlympiadBench add `modality` and `image_1` and so on.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from iapo.answer_format import boxes
from iapo.data.split import Divide, divide_by_id, divide_randomly
from iapo.tasks.embedded import TASKS
from iapo.tasks.quantity import quantity


@dataclass(frozen=True)
class Schema:
    """One form of a data set's rows.

    Attributes:
        columns: those that a row must have.
        parse: a row's question and its answer: a number, a text, or a list of these, any of which is right. May raise
            ValueError, KeyError, TypeError, AttributeError or IndexError where the row has another structure.
    """

    columns: tuple[str, ...]
    parse: Callable[[dict], tuple[object, object]]


@dataclass(frozen=True)
class Original:
    """Where a data set comes from and how its rows are read.

    Attributes:
        hub_id: None for data of the user's own.
        splits: the hub's: train and test, or a single one.
        schemas: the forms that its rows may have, the commonest first.
        config: the hub's configuration.
        divide: how a single split becomes train and test. None where there is no such way, or no train split.
        id: the column that `divide` may look at.
        keep: which rows belong to it; the others are left out.
        limit: how many distinct questions are taken of a split.
        evaluation: it has a test split alone.
    """

    hub_id: str | None
    splits: tuple[str, ...]
    schemas: tuple[Schema, ...]
    config: str | None = None
    divide: Divide | None = divide_randomly
    id: str | None = None
    keep: Callable[[dict], bool] = lambda row: True
    limit: int | None = None
    evaluation: bool = False


def columns(question: str, answer: str, read: Callable[[object], object] = lambda value: value) -> Schema:
    """A column with the question, and one from which `read` takes the answer."""
    return Schema((question, answer), lambda row: (row[question], row[answer] and read(row[answer])))


def own(question: str, answer: str) -> Original:
    """Data of the user's own: a folder with train* and test*, or one file."""
    return Original(None, ("train", "test"), (columns(question, answer),))


# --- answers ---


def after_hashes(solution: str) -> str:
    """GSM8K's answer is after the last `####`; thousands separators are removed: `#### 1,080` gives "1080"."""
    _, marker, final = solution.rpartition("####")
    if not marker:
        raise ValueError(f"answer: {solution!r} has no '####'")
    return re.sub(r"(?<=\d),(?=\d{3})", "", final)


def number(value: object) -> object:
    """Numbers that are written as text, as numbers: "145.0" is 145 and "073" is 73. Other values stay."""
    if isinstance(value, list):
        return [number(entry) for entry in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", value.strip()):
        return Decimal(value.strip())
    return value


def boxed(solution: str) -> str:
    r"""What is in the last `\boxed{}` of a solution."""
    found = boxes(solution)
    if not found or found[-1] is None:
        raise ValueError(f"solution: {solution[-80:]!r} has no closed \\boxed{{}}")
    return found[-1]


# --- rows that need more than two columns ---

DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'


def parse_dapo(row: dict) -> tuple[str, object]:
    """The question without the instructions around it: they ask for another answer format."""
    content = row["prompt"][0]["content"]
    if not (content.startswith(DAPO_PREFIX) and content.endswith(DAPO_SUFFIX)):
        raise ValueError(f"prompt: {content!r} lacks the data set's fixed first and last sentence")
    return content[len(DAPO_PREFIX) : -len(DAPO_SUFFIX)], row["reward_model"]["ground_truth"]


def parse_svamp(row: dict) -> tuple[str, object]:
    return f"{row['Body'].strip()} {row['Question'].strip()}", number(row["Answer"])


def parse_olympiadbench(row: dict) -> tuple[str, str]:
    """The context before the question; the answers, all of which are asked for, with their unit.

    A unit that the verifier doesn't know is left out: with it the bare number would be wrong.
    """
    if not isinstance(row["final_answer"], list):
        raise TypeError(f"final_answer is a {type(row['final_answer']).__name__}, no list")
    question = "\n\n".join(part for part in (row.get("context"), row["question"]) if part)
    answer = ", ".join(row["final_answer"])
    if len(re.findall(r"(?<!\\)\$", answer)) % 2 == 0:
        answer = re.sub(r"(?<!\\)\$", "", answer)
    with_unit = f"{answer} {row.get('unit')}"
    return question, with_unit if row.get("unit") and quantity(with_unit).units else answer


def is_open_text(row: dict) -> bool:
    """Whether a problem of OlympiadBench has no picture, and an answer rather than a proof."""
    pictures = [value for name, value in row.items() if name.startswith("image") and value]
    named = "<img_" in f"{row.get('context')} {row['question']}"
    return row.get("modality") in (None, "Text-only") and not pictures and not named and bool(row["final_answer"])


def competition(hub_id: str, read: Callable[[object], object] = number) -> Original:
    """A test split whose copies name their columns in one of these ways."""
    schemas = (
        columns("problem", "answer", read),
        columns("question", "answer", read),
        columns("Problem", "Answer", read),
        columns("problem", "solution", lambda solution: read(boxed(solution))),
    )
    return Original(hub_id, ("test",), schemas, evaluation=True)


ORIGINALS = {
    "gsm8k": Original(
        "openai/gsm8k", ("train", "test"), (columns("question", "answer", after_hashes),), config="main", divide=None
    ),
    "math500": Original("HuggingFaceH4/MATH-500", ("test",), (columns("problem", "answer"),)),
    "dapo_math_17k": Original(
        "BytedTsinghua-SIA/DAPO-Math-17k", ("train",), (Schema(("prompt", "reward_model"), parse_dapo),), limit=7000
    ),
    "svamp": Original(
        "ChilleD/SVAMP",
        ("train", "test"),
        (Schema(("ID", "Body", "Question", "Answer"), parse_svamp),),
        divide=divide_by_id,
        id="ID",
    ),
    "aime24": competition("math-ai/aime24"),
    "aime25": competition("math-ai/aime25"),
    "amc23": competition("math-ai/amc23"),
    "minerva": competition("math-ai/minervamath", read=lambda value: value),
    "olympiadbench": Original(
        "math-ai/olympiadbench",
        ("test",),
        (Schema(("question", "final_answer"), parse_olympiadbench),),
        keep=is_open_text,
        evaluation=True,
    ),
}
EVALUATION = tuple(name for name, original in ORIGINALS.items() if original.evaluation)
NAMES = (*ORIGINALS, *TASKS)
