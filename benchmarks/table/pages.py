"""What the table writes: results.json and table.md."""

import math
import shlex
import statistics
import sys
import time
from collections.abc import Mapping

from benchmarks.front import Point, regret
from benchmarks.table import pareto
from benchmarks.table.kept import KEEPING
from benchmarks.table.paired import differences
from benchmarks.table.plan import REFERENCE, UNTRAINED, Method
from benchmarks.table.table import TOLERANCE, Outcome, Table, as_json, preference, write_whole


def summary(table: Table, runs: Mapping[int, Outcome]) -> dict[str, list[float | None]]:
    """[mean, sample standard deviation over seeds] of each figure on the test split that all have; no deviation of one
    seed."""
    outcomes = list(runs.values())
    figures = [outcome.figures["test"] | regret_of(table, seed, outcome) for seed, outcome in runs.items()]
    columns = {name: [entry[name] for entry in figures] for name in figures[0] if all(name in e for e in figures)}
    for name in ("seconds_per_step", "discarded_prompts"):
        if None not in (values := [getattr(outcome, name) for outcome in outcomes]):
            columns[name] = values
    return {
        name: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
        for name, values in columns.items()
    }


def regret_of(table: Table, seed: int, outcome: Outcome) -> dict[str, float]:
    """{"regret": how far a run is below the front of the untrained model with its seed}: see `benchmarks.front.regret`.

    Empty where there is no front, or where it has no policy with as few tokens.
    """
    untrained = table.outcome(UNTRAINED, None, seed)
    if untrained is None or not untrained.front:
        return {}
    policy = Point(outcome.figures["test"]["tokens"], outcome.figures["test"]["pass@1"])
    found = regret([Point(*point) for point in untrained.front], policy)
    return {} if math.isnan(found) else {"regret": found}


def from_reference(table: Table, name: str, value) -> dict[str, tuple[float, float, float]]:
    """How a row differs from GRPO on the seeds that both have: see `benchmarks.table.paired.differences`.

    Empty for GRPO itself, and where a record has no counts of each problem.
    """
    reference = table.plan.methods.get(REFERENCE)
    if reference is None or name == REFERENCE or not (tried := table.tried(reference)):
        return {}
    theirs = table.runs_of(REFERENCE, tried[-1])
    pairs = [(ours.problems, theirs[s].problems) for s, ours in table.runs_of(name, value).items() if s in theirs]
    return differences(*zip(*pairs, strict=True)) if pairs and all(a and b for a, b in pairs) else {}


def shown(outcome: Outcome) -> dict:
    """An outcome without what only its record needs."""
    return {name: entry for name, entry in outcome._asdict().items() if name not in ("problems", "front")}


def results(table: Table) -> dict:
    """Everything that is known so far, as plain JSON values."""
    plan, rows = table.plan, {}
    for name in (UNTRAINED, *plan.methods):
        method = plan.methods.get(name, Method(UNTRAINED, "the model before any training", REFERENCE))
        if not (tried := table.tried(method)):
            continue
        *given_up, value = tried
        if runs := table.runs_of(name, value):
            rows[name] = {
                "knob": list(method.knob),
                "why": method.why,
                "value": value,
                "label": method.label(value),
                "match": method.match,
                "family": method.family,
                "test": summary(table, runs),
                "from_reference": from_reference(table, name, value),
                "seeds": {str(seed): shown(outcome) for seed, outcome in runs.items()},
                "grid": [{"value": v, **shown(outcome)} for v, outcome in table.grid(method).items()],
                "given_up": [
                    {"label": method.label(v), "test": summary(table, table.runs_of(name, v))} for v in given_up
                ],
            }
    means = {name: {key: mean for key, (mean, _) in row["test"].items()} for name, row in rows.items()}
    trained = {name: mean for name, mean in means.items() if name != UNTRAINED}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": command(),
        "settings": {"task": plan.task, "model": plan.model}
        | plan.settings()
        | {"seeds": plan.seeds, "prompts": {s: len(p) for s, p in table.prompts.items()}},
        "runs": {"done": table.done(), "planned": table.planned(), "failed": table.failed},
        "front": pareto.front({name: (mean["tokens"], mean["pass@1"]) for name, mean in means.items()}),
        "shortest": preference(trained, trained[REFERENCE]["pass@1"])[0] if REFERENCE in trained else None,
        "run_again": {
            name: method.run_again for name, method in plan.methods.items() if method.run_again and name not in rows
        },
        "oracle_front": front_of(table),
        "rows": rows,
    }


def front_of(table: Table) -> list[tuple[float, float]] | None:
    """(tokens, accuracy) of the best policies with the untrained model's mistakes, those with the first seed."""
    untrained = table.outcome(UNTRAINED, None, table.plan.seeds[0])
    return untrained.front if untrained else None


def command() -> str:
    return shlex.join(["bash", "scripts/reproduce_table.sh", *sys.argv[1:]])


COLUMNS = (
    ("Pass@1", "pass@1", 3),
    ("mean tokens", "tokens", 1),
    ("Ratio", "ratio@1", 4),
    ("truncated", "truncated", 4),
    ("tokens / minimum", "tokens/minimum", 3),
    ("s / step", "seconds_per_step", 1),
    ("discarded", "discarded_prompts", 1),
)
REGRET = ("regret", "regret", 3)  # of a task with an oracle


def markdown(found: dict) -> str:
    """table.md: the table and what one must know to read it."""
    settings, runs = found["settings"], found["runs"]
    columns = columns_of(settings["task"])
    lines = header(["method", "knob"], [*(title for title, _, _ in columns), "seeds"])
    for name, row in found["rows"].items():
        bold = "**" if name in found["front"] else ""
        cells = [with_deviation(row["test"].get(key), digits) for _, key, digits in columns]
        lines.append(f"| {bold}{name}{bold} | {row['label']} | " + " | ".join(cells) + f" | {len(row['seeds'])} |")
    lines += [f"| {name} | to be run again |" + " |" * (len(columns) + 1) for name in found["run_again"]]
    made = [run for row in found["rows"].values() for run in row["seeds"].values()]
    commits = sorted({commit for run in made for commit in (run["commit"] or "").split()})
    machines = sorted({run["machine"] for run in made if run["machine"]})
    seeds = ", ".join(map(str, settings["seeds"]))
    notes = [
        f"Written {found['date']}. " + " ".join(f"{machine}." for machine in machines),
        f"Command: `{found['command']}`. Commit of the runs: {', '.join(commits) or 'none'}.",
        f"{settings['task']} from the model {settings['model']}; {settings['steps']} training steps; seeds {seeds}, of "
        "which a row has as many as its last column says, from the first on: mean ± sample standard deviation over "
        f"them. Test split: {settings['prompts']['test']} prompts, {settings['samples']} sample(s) each at temperature "
        "1.",
        "Bold: on the Pareto front, no other row has fewer tokens at no lower Pass@1, or a higher Pass@1 at no more "
        "tokens. Ratio: Pass@1 / mean tokens. The minimum is the shortest trace that writes every addition once. "
        "Seconds of a step are a median; a run may have shared the machine with another. Discarded: prompts per step "
        "that dynamic sampling threw away with all their rollouts, most because these were all right or all wrong, "
        "some because the batch was full.",
    ]
    if settings["task"] in KEEPING:
        notes.append(
            "Regret: how far Pass@1 is below the best that a policy can do with as many tokens, if it makes no more "
            "mistakes in a step than the untrained model; below 0 where training made the steps more accurate. "
            + KEEPING[settings["task"]].note
        )
    if found["shortest"]:
        notes.append(
            f"Fewest tokens of all methods at most {100 * TOLERANCE:g} point below GRPO's Pass@1: {found['shortest']}."
        )
    if "validation" in settings["splits"]:
        notes.append(
            "Knobs: each value was trained with the first seed, and chosen on the validation split: the fewest tokens "
            f"among those at most {100 * TOLERANCE:g} point below GRPO's Pass@1, else the highest Pass@1. A choice "
            "whose mean over all seeds is further below there was given up for the next; if none holds, the highest "
            "mean is kept."
        )
        notes += [
            f"Not so {name}: of its values the one whose tokens are nearest to those of {row['match']}, first seed."
            for name, row in found["rows"].items()
            if row["match"]
        ]
        for name, row in found["rows"].items():
            for lost in row["given_up"]:
                accuracy, tokens = (with_deviation(lost["test"][key], n) for key, n in (("pass@1", 3), ("tokens", 1)))
                notes.append(f"Given up: {name} {lost['label']}; on the test split {accuracy}, {tokens} tokens.")
    else:
        notes.append("Each method at its default, not tuned.")
    if settings["overrides"]:
        notes.append(f"All runs with {' '.join(settings['overrides'])}.")
    notes += [f"To be run again: {name}, because {reason}." for name, reason in found["run_again"].items()]
    if runs["done"] < runs["planned"]:
        notes.append(f"**Not complete: {runs['done']} of {runs['planned']} runs are done.**")
    notes += [f"Failed: {name}: {reason}" for name, reason in runs["failed"].items()]
    return "\n\n".join(["\n".join(lines), *differences_table(found["rows"], columns), *notes]) + "\n"


def columns_of(task: str) -> tuple[tuple[str, str, int], ...]:
    """(title, figure, digits) of the columns of a task's table."""
    return (*COLUMNS, REGRET, *KEEPING[task].columns) if task in KEEPING else COLUMNS


def header(texts: list[str], numbers: list[str]) -> list[str]:
    """The first two lines of a table whose first columns are texts."""
    return ["| " + " | ".join(texts + numbers) + " |", "|" + "---|" * len(texts) + "---:|" * len(numbers)]


def differences_table(rows: dict[str, dict], columns: tuple[tuple[str, str, int], ...]) -> list[str]:
    """The table of the rows' differences from GRPO, and what it says; [] if none is known."""
    compared = {name: row["from_reference"] for name, row in rows.items() if row["from_reference"]}
    if not compared:
        return []
    columns = tuple(column for column in columns if any(column[1] in found for found in compared.values()))
    lines = header([f"minus {REFERENCE}", "knob"], [title for title, _, _ in columns])
    for name, found in compared.items():
        cells = [with_interval(found.get(key), digits) for _, key, digits in columns]
        lines.append(f"| {name} | {rows[name]['label']} | " + " | ".join(cells) + " |")
    note = (
        f"Means over the seeds that a row shares with {REFERENCE}, and 95% bootstrap intervals over problems and "
        "seeds, drawn alike for both. With few seeds they are too narrow for what another seed would give."
    )
    return ["\n".join(lines), note]


def with_interval(entry: tuple[float, float, float] | None, digits: int) -> str:
    if entry is None:
        return ""
    difference, low, high = entry
    return f"{difference:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def with_deviation(entry: list | None, digits: int) -> str:
    if entry is None:
        return ""
    mean, deviation = entry
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def write(table: Table) -> dict:
    """results.json and table.md, each whole or not at all."""
    found = results(table)
    write_whole(table.plan.out / "results.json", as_json(found))
    write_whole(table.plan.out / "table.md", markdown(found))
    return found
