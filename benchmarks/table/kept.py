"""What completions keep besides the answer, of the tasks that can say so: see `iapo.tasks.worked_sums.kept`."""

from collections.abc import Iterable

from iapo.tasks import worked_sums
from iapo.tasks.worked_sums import Kept
from iapo.tools.evaluate import Sample, by_problem

KEEPING = {"worked_sums": worked_sums}
# Work on the additions that need it over work on those that don't. A price on length leaves it near 1.
RATIO = "worked/needed : worked/unneeded"
# The kinds of addition that are counted.
COUNTED = ("needed", "unneeded")


def kept_figures(task: str, samples: Iterable[Sample]) -> dict[str, float]:
    """The task's `kept_metrics` of completions, with `RATIO` where both shares are above 0; {} of a task without.

    Raises:
        ValueError: a completion without its text.
    """
    if task not in KEEPING:
        return {}
    metrics = KEEPING[task].kept_metrics(kept_of(task, sample) for sample in samples)
    needed, unneeded = (metrics.get(f"worked/{kind}", 0.0) for kind in COUNTED)
    return metrics | ({RATIO: needed / unneeded} if needed and unneeded else {})


def kept_of(task: str, sample: Sample) -> Kept:
    """What a completion keeps.

    Raises:
        ValueError: it has no text.
    """
    if sample.text is None:
        raise ValueError(f"a completion of {sample.prompt!r} has no text 'output'; validate the run again.")
    return KEEPING[task].kept(KEEPING[task].parse_prompt(sample.prompt), sample.text)


def counts(task: str, samples: Iterable[Sample]) -> dict[str, list[float]]:
    """What the figures are ratios of: by name a sum over the completions of each problem, in the order of the prompts.

        samples, right, tokens               of every task
        filler, sums/KIND, worked/KIND       filler words, additions of a kind, and how many of them are worked

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
    kept = [kept_of(task, sample) for sample in group]
    found["filler"] = sum(completion.filler for completion in kept)
    for kind in COUNTED:
        of_kind = [step for completion in kept for step in completion.sums if KEEPING[task].kind_of(step) == kind]
        found |= {f"sums/{kind}": len(of_kind), f"worked/{kind}": sum(step.worked for step in of_kind)}
    return found
