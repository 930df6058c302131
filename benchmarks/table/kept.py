"""What completions keep besides the answer, of the tasks whose generator knows what is of use."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.front import Point, front
from benchmarks.front.oracles import ORACLES
from iapo.tasks.checked_registers import Kept as Registers
from iapo.tasks.worked_sums import Kept as Sums
from iapo.tasks.worked_sums import kind_of
from iapo.tools.evaluate import Sample, by_problem


class Keeping(NamedTuple):
    """How a table counts what completions keep.

    Attributes:
        counts: sums over completions, by name.
        figures: the names of the `kept_metrics` that are ratios of two counts, and of these counts; "samples" is the
            number of completions.
        ratio: two of the figures: useful work where it is needed, and the same where it is not. Their quotient is
            about 1 where only length counts.
        columns: title, figure and digits of the table's columns.
        note: what a reader of the columns must know.
        work: a figure that a good policy keeps, and its name in the picture.
        waste: one that it gives up.
    """

    counts: Callable[[Sequence[Any]], dict[str, float]]
    figures: dict[str, tuple[str, str]]
    ratio: tuple[str, str]
    columns: tuple[tuple[str, str, int], ...]
    note: str
    work: tuple[str, str]
    waste: tuple[str, str]


RATIO = "needed : unneeded"


def counts_of_sums(kept: Sequence[Sums]) -> dict[str, float]:
    """filler words; sums/KIND, additions of a kind; worked/KIND, those that are worked."""
    found = {"filler": sum(completion.filler for completion in kept)}
    for kind in ("needed", "unneeded"):
        of_kind = [step for completion in kept for step in completion.sums if kind_of(step) == kind]
        found |= {f"sums/{kind}": len(of_kind), f"worked/{kind}": sum(step.worked for step in of_kind)}
    return found


def counts_of_registers(kept: Sequence[Registers]) -> dict[str, float]:
    """steps/due, /needed, /unneeded; products/KIND and how many of them are checked, checks/KIND: needed ones of an
    unknown and a known pair, and unneeded ones."""
    steps = [step for completion in kept for step in completion.steps]
    products = {
        "unknown": [step for step in steps if step.product and step.needed and step.unknown],
        "known": [step for step in steps if step.product and step.needed and not step.unknown],
        "unneeded": [step for step in steps if step.product and not step.needed],
    }
    needed = sum(step.needed for step in steps)
    found = {"steps/due": sum(completion.due for completion in kept), "steps/needed": needed}
    found["steps/unneeded"] = len(steps) - needed
    for kind, of_kind in products.items():
        found |= {f"products/{kind}": len(of_kind), f"checks/{kind}": sum(step.checked for step in of_kind)}
    return found


KEEPING: dict[str, Keeping] = {
    "worked_sums": Keeping(
        counts=counts_of_sums,
        figures={
            "filler": ("filler", "samples"),
            "worked/needed": ("worked/needed", "sums/needed"),
            "worked/unneeded": ("worked/unneeded", "sums/unneeded"),
        },
        ratio=("worked/needed", "worked/unneeded"),
        columns=(
            ("filler words", "filler", 2),
            ("worked where many carry", "worked/needed", 3),
            ("where none does", "worked/unneeded", 3),
            ("many / none", RATIO, 2),
        ),
        note="Filler words: per completion. Worked: the share of the additions that are worked by columns, where two "
        "or more carry and where none does. The model of tiny-worked needs the columns everywhere, so nothing has to "
        "tell the two apart.",
        work=("worked/needed", "additions worked by columns"),
        waste=("filler", "filler words"),
    ),
    "checked_registers": Keeping(
        counts=counts_of_registers,
        figures={
            "needed": ("steps/needed", "steps/due"),
            "unneeded": ("steps/unneeded", "samples"),
            "checked/unknown": ("checks/unknown", "products/unknown"),
            "checked/known": ("checks/known", "products/known"),
            "checked/unneeded": ("checks/unneeded", "products/unneeded"),
        },
        ratio=("checked/unknown", "checked/known"),
        columns=(
            ("needed steps", "needed", 3),
            ("unneeded steps", "unneeded", 2),
            ("unknown checked", "checked/unknown", 3),
            ("known checked", "checked/known", 3),
            ("unknown / known", RATIO, 2),
            ("unneeded checked", "checked/unneeded", 3),
        ),
        note="Needed steps: the share of what the query needs that is worked out. Unneeded steps: per completion. "
        "Checked: the share of the needed products of unknown pairs, of known pairs, and of the products that nobody "
        "needs, after which a check works the product out. A check pays for unknown pairs alone. The ratio of unknown "
        "to known is about 1 where only length counts; it is empty where a run checks none of the one or the other.",
        work=("checked/unknown", "unknown products checked"),
        waste=("checked/known", "known products checked"),
    ),
}


def kept_figures(task: str, samples: Sequence[Sample]) -> dict[str, float]:
    """The task's `kept_metrics` of completions, with `RATIO` where both of its shares are above 0; {} of a task
    without.

    Raises:
        ValueError: a completion without its text.
    """
    if task not in KEEPING:
        return {}
    metrics = ORACLES[task].task.kept_metrics(kept_of(task, sample) for sample in samples)
    needed, unneeded = (metrics.get(name, 0.0) for name in KEEPING[task].ratio)
    return metrics | ({RATIO: needed / unneeded} if needed and unneeded else {})


def kept_of(task: str, sample: Sample) -> Any:
    """What a completion keeps.

    Raises:
        ValueError: it has no text.
    """
    if sample.text is None:
        raise ValueError(f"a completion of {sample.prompt!r} has no text 'output'; validate the run again.")
    module = ORACLES[task].task
    return module.kept(module.parse_prompt(sample.prompt), sample.text)


def counts(task: str, samples: Iterable[Sample]) -> dict[str, list[float]]:
    """What the figures are ratios of: by name a sum over the completions of each problem, in the order of the prompts.

    samples, right and tokens of every task, and those of its `KEEPING`.

    Raises:
        ValueError: no samples, or one without the text that the task needs.
    """
    rows = [counts_of(task, group) for _, group in sorted(by_problem(samples).items())]
    if not rows:
        raise ValueError("samples: 0; give the completions of at least one problem.")
    return {name: [row[name] for row in rows] for name in rows[0]}


def counts_of(task: str, group: list[Sample]) -> dict[str, float]:
    """`counts` of the completions of one problem."""
    found = {
        "samples": len(group),
        "right": sum(sample.correct for sample in group),
        "tokens": sum(sample.tokens for sample in group),
    }
    if task not in KEEPING:
        return found
    return found | KEEPING[task].counts([kept_of(task, sample) for sample in group])


def oracle_front(task: str, samples: Sequence[Sample]) -> list[Point] | None:
    """The best that a policy can do that makes no more mistakes than these completions: see `benchmarks.front`.

    None of a task whose generator doesn't know what is of use, and where a form never occurs, such as an addition that
    is worked by columns, so that nobody knows how often it is right.
    """
    if task not in ORACLES:
        return None
    oracle, prompts = ORACLES[task], sorted({sample.prompt for sample in samples})
    rates = oracle.right_rates(kept_of(task, sample) for sample in samples)
    if rates.keys() != set(oracle.EVERY_FORM):
        return None
    return front([oracle.ways(oracle.task.parse_prompt(prompt), rates) for prompt in prompts])
