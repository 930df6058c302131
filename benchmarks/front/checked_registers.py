"""The front of checked registers: no step that the query doesn't need, and each product fast or checked."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from benchmarks.front import Point
from iapo.tasks import checked_registers as task
from iapo.tasks.checked_registers import Kept, Problem

COLUMNS = ("unknown checked", "known checked", "unneeded checked", "needed steps", "unneeded steps")


class Form(NamedTuple):
    """What decides how often a step is right."""

    product: bool
    unknown: bool
    checked: bool

    def __str__(self) -> str:
        if not self.product:
            return "easy"
        return f"{'unknown' if self.unknown else 'known'}, {'checked' if self.checked else 'fast'}"


EASY = Form(False, False, False)
EVERY_FORM = (*(Form(True, unknown, checked) for unknown in (True, False) for checked in (False, True)), EASY)
RATES = tuple(map(str, EVERY_FORM))
METRICS = ("checked/unknown", "checked/known", "checked/unneeded", "needed", "unneeded")

Rates = Mapping[Form, float]


def right_rates(completions: Iterable[Kept]) -> dict[Form, float]:
    """The share of right values by form, of the steps that are needed; forms that never occur are left out.

    The front has no other steps, and the untrained model is wrong more often in these.

    Every product has a fast value, so the rate of fast products is over those with a check too. Else it would be of the
    products that the model chose to leave unchecked.
    """
    right: dict[Form, list[bool]] = defaultdict(list)
    for step in (step for completion in completions for step in completion.steps if step.needed):
        if not step.product:
            right[EASY].append(step.right)
            continue
        right[Form(True, step.unknown, False)].append(step.fast)
        if step.checked:
            right[Form(True, step.unknown, True)].append(step.right)
    return {form: fmean(right[form]) for form in EVERY_FORM if form in right}


def ways(problem: Problem, rates: Rates) -> list[Point]:
    """What it takes to answer a problem with the steps that it needs, each product fast or checked.

    The answer is right if all steps are, and their mistakes are taken to be independent.

    Raises:
        ValueError: a step's form has no rate.
    """
    points = [Point(task.minimal_tokens(problem), 1.0)]
    known = task.values(problem)
    for definition in task.needed(problem):
        forms = {EASY: 0}
        if definition.operator == "*":
            a, b = task.operand_values(definition, known)
            work = task.token_count(f"{task.check(a, b)}={definition.register}{known[definition.register]:02d}")
            forms = {Form(True, task.unknown(a, b), checked): work * checked for checked in (False, True)}
        for form in forms:
            if form not in rates:
                raise ValueError(f"rates: no step is {form}; sample more completions.")
        points = [
            Point(tokens + work, accuracy * rates[form]) for tokens, accuracy in points for form, work in forms.items()
        ]
    return points


def columns(completions: Sequence[Kept]) -> list[float]:
    metrics = task.kept_metrics(completions)
    return [metrics.get(name, math.nan) for name in METRICS]


def rate_rows(rates: Rates) -> dict[str, list[float]]:
    return {"": [rates.get(form, math.nan) for form in EVERY_FORM]}
