"""Every method on an embedded task, in one table: bash scripts/reproduce_table.sh [--quick] [options] [key=value ...]

Trains each method of benchmarks/table/table.yaml on verbose arithmetic, or with --table NAME those of NAME.yaml on its
task, from an embedded model, with the same prompts and rollouts, and evaluates it on the whole test split. Each value
of a method's knob is trained with the first seed; the one that the validation split chooses also with the others:

    the fewest tokens among the values whose validation Pass@1 is at most 1 point below GRPO's,
    and the highest Pass@1 if none is; of GRPO's own values the one with the highest Pass@1.

A choice whose mean over all seeds there turns out to be more than 1 point below GRPO's is given up for the next best;
if none holds, the one with the highest mean is kept.
The rule asks what a user asks, how short at no loss of accuracy, and needs no exchange rate between tokens and points.
A row with `match` takes the value instead whose tokens are nearest to those of another row.

The output folder gets results.json, table.md, pareto.png, the runs, and a record of what each complete run showed.
Start the same command again to resume after a stop: complete runs are kept, others resume from their last checkpoint,
failed ones are tried again. A record stands for its run: runs/ may be deleted, and the folder moved to another machine
to resume there. key=value goes to every run, as in iapo.train.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import psutil

from benchmarks.table import pareto, picture
from benchmarks.table.jobs import STOPS, Job, Running, run_all, slots_by_memory
from benchmarks.table.kept import KEEPING
from benchmarks.table.pages import command, markdown, write
from benchmarks.table.plan import (
    DEFAULT,
    UNTRAINED,
    Plan,
    check_runs,
    make_plan,
    resolved_config,
    write_evaluation_file,
)
from benchmarks.table.table import Table, clock, say, write_whole
from iapo.data import prepare
from iapo.launch.folder_lock import FolderInUse, lock

TRAIN = (sys.executable, "-u", "-m", "iapo.train")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", default=DEFAULT, help=f"a YAML of benchmarks/table by its name, default {DEFAULT}")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, no tuning: within 30 minutes")
    parser.add_argument("--methods", help="some of the table's, as a,b; those that tuning looks at are added")
    parser.add_argument("--steps", type=int, help="training steps of each run")
    parser.add_argument("--samples", type=int, help="completions per prompt of the evaluation")
    parser.add_argument("--seeds", help="as 0,1,2; the first is the one that knobs are chosen with")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side where memory allows, default 2")
    parser.add_argument("--out", help="output folder, default runs/NAME of the table, or runs/NAME-quick")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to every run")
    return parser.parse_intermixed_args(arguments)


def open_folder(plan: Plan) -> None:
    """Make the output folder with its data; refuse one of a table with other settings.

    Raises:
        ValueError: in one line.
    """
    file = plan.out / "settings.json"
    settings = json.loads(json.dumps({"table": plan.table} | plan.settings()))
    if plan.out.exists() and not plan.out.is_dir():
        raise ValueError(f"--out: {plan.out} is a file; choose a folder.")
    plan.out.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        try:
            before = table_named(json.loads(file.read_text()))
            before = {name: before[name] for name in settings}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: no settings ({error!r}); delete it, or choose another folder.") from None
        for name, value in settings.items():
            if before[name] != value:
                raise ValueError(
                    f"--out: {plan.out} holds a table with {name}={before[name]}, but now it is {value}; set it back "
                    "or choose another folder."
                )
    else:
        write_whole(file, json.dumps(settings) + "\n")
    if not plan.data_file("evaluation").is_file():
        prepare(plan.task, plan.out / "data")
        write_evaluation_file(plan)


def table_named(settings: dict) -> dict:
    """The content of a settings.json; one that names no table is of the default."""
    return {"table": DEFAULT} | settings


def shower(table: Table, slots: int, interval_s: float = 30.0) -> Callable[[list[Running]], None]:
    """A progress callback: one line now and then."""
    last = -interval_s

    def show(running: list[Running]) -> None:
        nonlocal last
        if time.monotonic() - last < interval_s:
            return
        last = time.monotonic()
        at_work = ", ".join(f"{run.job.name} (step {run.job.steps_done()})" for run in running)
        left = clock(table.seconds_left(running, slots))
        done = f"{table.done()}/{table.planned()} runs of {table.plan.steps} steps done"
        say(f"{done}; {at_work}; about {left} left")

    return show


def main(
    arguments: list[str] | None = None,
    train: Sequence[str] = TRAIN,
    config_of: Callable[[Job], str] = resolved_config,
    interval_s: float = 1.0,
) -> int:
    """Exit status: 0 all runs are done, 1 some failed, 2 refused, 130/143 stopped."""
    for number in STOPS:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        options = parse(arguments)
        plan = make_plan(options)
        # Each run has a Ray of its own, where with an address all would join one, and the data next to the results.
        os.environ.pop("RAY_ADDRESS", None)
        os.environ["IAPO_DATA_DIR"] = str(plan.out / "data")
        say(f"{len(plan.methods)} methods, {plan.jobs} runs of {plan.steps} steps; checking them")
        configs = check_runs(plan, config_of)  # refused here, nothing is written
        open_folder(plan)
        held = lock(plan.out / "lock")
    except (ValueError, OSError, FolderInUse) as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    with held:
        try:
            return reproduce(Table(plan, config_of, configs), options.jobs, train, interval_s)
        except SystemExit as stopped:
            say(f"stopped; the same command resumes: {command()}")
            return stopped.code


def earlier_rows(plan: Plan) -> set[str]:
    """The rows of the table in the output folder."""
    try:
        return set(json.loads((plan.out / "results.json").read_text())["rows"])
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or what is there is none: it is written anew
        return set()


def reproduce(table: Table, most_jobs: int, train: Sequence[str], interval_s: float) -> int:
    plan = table.plan
    slots = slots_by_memory(most_jobs, psutil.virtual_memory().available)
    try:
        waiting = table.wanted()
        table.record_earlier()
    except ValueError as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    left = clock(table.seconds_left([], slots))
    say(
        f"{table.done()} are done already; about {left} for the others, {slots} side by side, if this machine "
        f"is like the one of benchmarks/README.md; everything lands in {plan.out}"
    )
    if left_out := earlier_rows(plan) - {UNTRAINED, *plan.methods}:
        say(f"this table is without {', '.join(sorted(left_out))}, which an earlier one in this folder had")

    def finished(run: Running) -> None:
        table.finished(run)
        write(table)

    if waiting:
        run_all(table.wanted, finished, table.failed, shower(table, slots), train, slots, interval_s)
    found = write(table)
    if found["rows"]:
        pareto.draw(found["rows"], found["front"], plan.out / "pareto.png")
        if plan.task in KEEPING:
            picture.draw(found["rows"], found["oracle_front"], KEEPING[plan.task], plan.out / "kept.png")
    print("\n" + markdown(found))
    say(f"written: {plan.out}/results.json, table.md, pareto.png{', kept.png' if plan.task in KEEPING else ''}")
    if table.failed:
        say(f"{len(table.failed)} run(s) failed, see above; the same command tries them again: {command()}")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
