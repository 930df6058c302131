"""Every method on the embedded task, in one table: bash scripts/reproduce_table.sh [--quick] [options] [key=value ...]

Trains each method of benchmarks/table.yaml on verbose arithmetic from the embedded model, with the same prompts and
rollouts, and evaluates it on the whole test split. Each value of a method's knob is trained with the first seed; the
one that the validation split chooses also with the others:

    the fewest tokens among the values whose validation Pass@1 is at most 1 point below GRPO's,
    and the highest Pass@1 if none is; of GRPO's own values the one with the highest Pass@1.

A choice whose mean over all seeds there turns out to be more than 1 point below GRPO's is given up for the next best;
if none holds, the one with the highest mean stands.
The rule asks what a user asks, how short at no loss of accuracy, and needs no exchange rate between tokens and points.

The output folder gets results.json, table.md, pareto.png, the runs, and a record of what each complete run showed.
Start the same command again to go on after a stop: complete runs are kept, others go on from their last checkpoint,
failed ones are tried again. A record stands for its run: runs/ may be deleted, and the folder moved to another machine
to go on there. key=value goes to every run, as in iapo.train.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow.parquet as pq
import yaml

from benchmarks import pareto
from benchmarks.jobs import STOPS, Job, Running, run_all, slots_by_memory
from iapo.data import prepare, write_parquets
from iapo.evaluation import bootstrap, evaluate, of_prompts, read_prompts, read_samples
from iapo.folder_lock import FolderInUse, lock
from iapo.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
TRAIN = (sys.executable, "-u", "-m", "iapo.train")
REFERENCE, TOLERANCE = "grpo", 0.01
UNTRAINED = "untrained"

# Expected seconds that a run takes to start, beyond those of its first step, and for each completion of its evaluation,
# with two runs side by side on two cores: benchmarks/README.md.
START_S, COMPLETION_S = 100.0, 0.036

# What the table itself says of a run, beside the knobs, or counts on.
RESERVED = {"variant", "data", "data.val_files", "seed", "run_dir", "trainer.total_training_steps", "trainer.test_freq"}
RESERVED |= {"trainer.val_before_train", "trainer.val_only", "trainer.validation_data_dir", "trainer.default_local_dir"}
RESERVED |= {"actor_rollout_ref.rollout.val_kwargs.n"}

# verl's counts of prompts, although it calls them samples.
DISCARDED = ("training/filter_groups/evicted_samples", "training/filter_groups/discarded_surplus_samples")
# What docs/findings.md explains results by: see docs/metrics.md.
DIAGNOSTICS = ("iapo/advantage_share/", "iapo/information_gain/", "iapo/exit_entropy/", "iapo/information_rate")


@dataclass(frozen=True)
class Method:
    """A line of table.yaml: the values that are tried of the keys `knob`; (None,) if it has no knob."""

    name: str
    why: str
    variant: str  # as iapo.train takes it: one, or several as [a,b]
    knob: tuple[str, ...] = ()
    values: tuple = (None,)
    quick: bool = True  # whether --quick runs it, with the first of its values

    def overrides(self, value) -> list[str]:
        return [f"{key}={value}" for key in self.knob]

    def label(self, value) -> str:
        """The knob's short name with its value: k=4."""
        return f"{'='.join(key.rpartition('.')[2] for key in self.knob)}={value}" if self.knob else ""


@dataclass(frozen=True)
class Plan:
    """What to train, and where."""

    methods: dict[str, Method]
    steps: int
    samples: int
    seeds: tuple[int, ...]
    out: Path
    step_s: float = 11.0  # expected seconds of a step
    splits: tuple[str, ...] = ("validation", "test")
    overrides: tuple[str, ...] = ()

    def settings(self) -> dict:
        """What all runs of one output folder share."""
        return {name: getattr(self, name) for name in ("steps", "samples", "splits", "overrides")}

    @property
    def jobs(self) -> int:
        """How many runs it takes, the untrained model's evaluations included."""
        grid = sum(len(method.values) for method in self.methods.values())
        return len(self.seeds) + grid + len(self.methods) * (len(self.seeds) - 1)

    def data_file(self, name: str) -> Path:
        """train, a split, or what runs are evaluated on: see `write_evaluation_file`."""
        return self.out / "data" / "verbose_arithmetic" / f"{name}.parquet"

    def job(self, name: str, value, seed: int) -> Job:
        """The run of a method, or of none, with a value of its knob and a seed."""
        trained = name != UNTRAINED
        title = f"{name}-{str(value).replace('/', '_')}-seed{seed}" if value is not None else f"{name}-seed{seed}"
        folder = self.out / "runs" / title
        arguments = [
            "platform=cpu",
            f"variant={self.methods[name].variant if trained else REFERENCE}",
            "model=tiny",
            "data=verbose_arithmetic",
            f"data.val_files='{self.data_file('evaluation')}'",
            f"seed={seed}",
            f"run_dir='{folder}'",
            f"trainer.total_training_steps={self.steps}",
            f"trainer.test_freq={self.steps}",
            "trainer.save_freq=10",
            "trainer.max_actor_ckpt_to_keep=1",
            "iapo.validation_information=false",
            *(self.methods[name].overrides(value) if trained else ()),
            *self.overrides,
            f"trainer.val_before_train={str(not trained).lower()}",
            f"trainer.val_only={str(not trained).lower()}",
        ]
        return Job(title, folder, tuple(arguments))


def write_evaluation_file(plan: Plan) -> None:
    """The prompts of all splits, `samples` rows for each, told apart by their index, which seeds a completion.

    val_kwargs.n would sample as often, but above 1 verl bootstraps the best of n of every prompt and number, which
    takes longer than the sampling.
    """
    rows = [row for split in plan.splits for row in pq.read_table(plan.data_file(split)).to_pylist()]
    distinct = 1 + max(row["extra_info"]["index"] for row in rows)
    copies = [
        row | {"extra_info": row["extra_info"] | {"index": row["extra_info"]["index"] + copy * distinct}}
        for copy in range(plan.samples)
        for row in rows
    ]
    write_parquets({plan.data_file("evaluation"): copies})


def load_methods(path: Path) -> dict[str, Method]:
    """The methods of a table.yaml, in its order.

    Raises:
        ValueError: an entry that is none, in one line.
    """
    methods = {}
    for name, entry in read_section(path, "methods").items():
        where = f"{path.name}: methods.{name}"
        if not isinstance(entry, dict) or not isinstance(entry.get("why"), str):
            raise ValueError(f"{where}.why is missing; say in a line why these values.")
        if unknown := entry.keys() - {"why", "variant", "knob", "values", "quick"}:
            raise ValueError(
                f"{where}.{min(unknown, key=str)} is unknown; an entry has why, variant, knob, values and quick."
            )
        variant, keys, values = (as_list(entry.get(key)) for key in ("variant", "knob", "values"))
        if not all(isinstance(text, str) for text in (name, *variant, *keys)):
            raise ValueError(f"{where}: its name, variant and knob must be texts.")
        if bool(keys) != bool(values) or len(values) > 4:
            raise ValueError(f"{where} needs both knob and 1 to 4 values, or neither.")
        if not all(isinstance(value, bool | int | float | str) for value in values) or len(set(values)) < len(values):
            raise ValueError(f"{where}.values: {values} must be numbers or texts, each once.")
        if not isinstance(quick := entry.get("quick", True), bool):
            raise ValueError(f"{where}.quick: {quick!r} must be true or false.")
        variants = f"[{','.join(variant)}]" if len(variant) > 1 else variant[0] if variant else name
        methods[name] = Method(name, entry["why"], variants, tuple(keys), tuple(values) or (None,), quick)
    return methods


def read_section(path: Path, name: str) -> dict:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: no YAML: {' '.join(str(error).split())}") from None
    section = content.get(name) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path.name}: {name} is missing, or is no mapping.")
    return section


def as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def make_plan(options: argparse.Namespace, path: Path = ROOT / "benchmarks/table.yaml") -> Plan:
    """The plan that the command's options ask for.

    Raises:
        ValueError: an unknown method, an impossible number, an argument that is no key=value.
    """
    settings = read_section(path, "quick" if options.quick else "full")
    methods = load_methods(path)
    usual = [name for name, method in methods.items() if method.quick or not options.quick]
    chosen = [name.strip() for name in options.methods.split(",")] if options.methods else usual
    for name in chosen:
        if name not in methods:
            raise ValueError(f"--methods: {name!r} must be one of {', '.join(methods)}.")
    if not options.quick and REFERENCE not in chosen:
        chosen.append(REFERENCE)  # the rule that chooses a knob's value looks at it
    methods = {name: method for name, method in methods.items() if name in chosen}
    if options.quick:
        methods = {name: replace(m, values=m.values[:1]) for name, m in methods.items()}
    for name in ("steps", "samples", "jobs"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name}: {value} must be at least 1.")
    for override in options.overrides:
        if "=" not in override:
            raise ValueError(f"{override}: an argument for the runs is key=value.")
        key = override.partition("=")[0].lstrip("+~")
        if key in RESERVED or any(key in method.knob for method in methods.values()):
            raise ValueError(
                f"{override}: the table sets {key}; use --seeds, --steps, --samples, --out, or change {path.name}."
            )
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else settings["seeds"]
    except ValueError:
        raise ValueError(f"--seeds: {options.seeds!r} must be whole numbers such as 0,1,2.") from None
    return Plan(
        methods=methods,
        steps=options.steps or settings["steps"],
        samples=options.samples or settings["samples"],
        seeds=tuple(dict.fromkeys(seeds)),
        step_s=settings["step_s"],
        out=Path(options.out or ("runs/table-quick" if options.quick else "runs/table")).absolute(),
        splits=("test",) if options.quick else ("validation", "test"),
        overrides=(*settings.get("overrides", ()), *options.overrides),
    )


def preference(grid: dict, reference: float | None) -> list:
    """The values of a knob in the order in which the rule in the module's docstring takes them.

    Args:
        grid: figures of `iapo.evaluation` on the validation split by value.
        reference: GRPO's Pass@1 there; None for GRPO itself.

    Returns:
        The accurate values, shortest first, or the most accurate one alone if there are none.
    """
    accurate = [] if reference is None else [v for v in grid if not_below(grid[v]["pass@1"], reference)]
    most = max(grid, key=lambda value: grid[value]["pass@1"])
    return sorted(accurate, key=lambda value: grid[value]["tokens"]) or [most]


def not_below(accuracy: float, reference: float) -> bool:
    """At most `TOLERANCE` below."""
    return accuracy >= reference - TOLERANCE - 1e-9


def check_runs(plan: Plan, config_of: Callable[[Job], str]) -> dict[str, str]:
    """The configurations of all runs with the first seed by their names.

    Raises:
        ValueError: one would be refused; so that a mistake shows now, and not hours later.
    """
    runs = [(UNTRAINED, None)] + [(method.name, value) for method in plan.methods.values() for value in method.values]
    configs = {}
    for job in [plan.job(*run, plan.seeds[0]) for run in runs]:
        try:
            configs[job.name] = config_of(job)
        except ValueError as error:
            raise ValueError(f"{job.name}: {error}") from None
    return configs


def resolved_config(job: Job) -> str:
    """The text of the config.yaml that a start of this job would write.

    Raises:
        iapo.checks.ConfigError: iapo.train would refuse it.
    """
    from omegaconf import OmegaConf

    from iapo.checks import check
    from iapo.train import resolve

    config = resolve(list(job.arguments))
    check(config, files=False)
    return OmegaConf.to_yaml(config)


class Outcome(NamedTuple):
    """What a complete run showed: figures by split, and how long its steps took."""

    figures: dict[str, dict[str, float]]
    intervals: dict[str, tuple[float, float]]  # on the test split
    seconds_per_step: float | None
    commit: str | None
    machine: str | None  # hardware and versions
    discarded_prompts: float | None = None  # per step, whose rollouts dynamic sampling threw away
    diagnostics: dict[str, float] | None = None  # DIAGNOSTICS, means over the steps


@dataclass
class Table:
    """The state of a plan: which of its runs are complete and which have failed."""

    plan: Plan
    config_of: Callable[[Job], str] = resolved_config
    _configs: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    _ratios: list[float] = field(default_factory=list)  # of the time that a run took to what was expected

    def __post_init__(self):
        self._prompts = {split: read_prompts(self.plan.data_file(split)) for split in self.plan.splits}

    # -- which runs are there -----------------------------------------------------------------------------------

    def outcome(self, name: str, value, seed: int) -> Outcome | None:
        """Of a complete run, which was made as it would be now: by its record, or if all samples of its last validation
        are there. None of a failed one, even if another process completes it meanwhile: choices must not flip."""
        job = self.plan.job(name, value, seed)
        if job.name in self.failed:
            return None
        if job.name not in self._outcomes:
            if (outcome := self._recorded(job)) is not None:
                self._outcomes[job.name] = outcome
            elif (samples := self._last_validation(job, name)) is not None:
                if self.config(job) == (job.folder / "config.yaml").read_text():
                    self._outcomes[job.name] = self._evaluate(job, samples)
        return self._outcomes.get(job.name)

    def _record_file(self, job: Job) -> Path:
        return self.plan.out / "records" / f"{job.name}.json"

    def _recorded(self, job: Job) -> Outcome | None:
        if not (file := self._record_file(job)).is_file():
            return None
        fingerprint = self._fingerprint(job)
        try:
            record = json.loads(file.read_text())
            outcome = Outcome(**record["outcome"])
            return outcome if record["fingerprint"] == fingerprint else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: is no record of a run ({error!r}); delete it.") from None

    def record(self, job: Job) -> None:
        """Keep what a complete run showed; not while it may still be alive."""
        record = {"fingerprint": self._fingerprint(job), "outcome": self._outcomes[job.name]._asdict()}
        write_whole(self._record_file(job), json.dumps(record, indent=1) + "\n")

    def record_earlier(self) -> None:
        """Record runs that were complete when an earlier table was stopped."""
        for job in [self.plan.job(*run) for run in self.known()]:
            if job.name in self._outcomes and not self._record_file(job).is_file():
                with contextlib.suppress(FolderInUse), lock(job.folder / "lock"):
                    self.record(job)

    def _fingerprint(self, job: Job) -> str:
        """Of a run's configuration and evaluation, the same wherever the output folder and the code are."""
        text = json.dumps([self.config(job), self.plan.settings()])
        return hashlib.sha256(text.replace(str(self.plan.out), "OUT").replace(str(ROOT), "ROOT").encode()).hexdigest()

    def config(self, job: Job) -> str:
        if job.name not in self._configs:
            self._configs[job.name] = self.config_of(job)
        return self._configs[job.name]

    def _last_validation(self, job: Job, name: str) -> dict[str, list] | None:
        """The samples by split; None if some are missing."""
        dump = job.folder / "validation" / f"{0 if name == UNTRAINED else self.plan.steps}.jsonl"
        if not dump.is_file():
            return None
        try:
            samples = read_samples(dump)
        except ValueError:  # a killed run may leave half a file
            return None
        splits = {split: of_prompts(samples, prompts) for split, prompts in self._prompts.items()}
        whole = all(len(splits[s]) == len(self._prompts[s]) * self.plan.samples for s in splits)
        return splits if whole else None

    def _evaluate(self, job: Job, splits: dict[str, list]) -> Outcome:
        ks = [k for k in (1, 2, 4, 8, 16) if k <= self.plan.samples]
        metrics = [data for _, data in read_metrics(job.folder / "metrics.jsonl") if "timing_s/step" in data]
        seconds = [data["timing_s/step"] - data.get("timing_s/save_checkpoint", 0.0) for data in metrics[1:]]
        discarded = [sum(data.get(key, 0.0) for key in DISCARDED) for data in metrics]
        starts = job.folder / "starts.jsonl"
        versions = [json.loads(line)["versions"] for line in starts.read_text().splitlines()]
        commits = [found.pop("commit") for found in versions]
        named = ", ".join(f"{name} {version}" for name, version in versions[-1].items())
        return Outcome(
            figures={split: evaluate(samples, ks) for split, samples in splits.items()},
            intervals=bootstrap(splits["test"], ks),
            seconds_per_step=statistics.median(seconds) if seconds else None,
            commit=" ".join(dict.fromkeys(commits)) or None,
            machine=f"{hardware()}; {named}",
            discarded_prompts=statistics.mean(discarded) if discarded else None,
            diagnostics=diagnostics(metrics),
        )

    # -- which are wanted ---------------------------------------------------------------------------------------

    def grid(self, method: Method) -> dict[object, Outcome]:
        """The complete runs of the first seed by the knob's value."""
        found = {value: self.outcome(method.name, value, self.plan.seeds[0]) for value in method.values}
        return {value: outcome for value, outcome in found.items() if outcome is not None}

    def tried(self, method: Method) -> list:
        """The values of the knob to train with all seeds: those given up, then the chosen one; [] while it is open."""
        if len(method.values) == 1:
            return list(method.values)
        grid = self.grid(method)
        settled = all(
            value in grid or self.plan.job(method.name, value, self.plan.seeds[0]).name in self.failed
            for value in method.values
        )
        if not settled or not grid:
            return []
        figures = {value: outcome.figures["validation"] for value, outcome in grid.items()}
        if method.name == REFERENCE:
            return preference(figures, None)
        reference = self.plan.methods[REFERENCE]
        *_, best = self.tried(reference) or [None]
        if best not in (references := self.grid(reference)):
            return []
        order = preference(figures, references[best].figures["validation"]["pass@1"])
        bar = self.mean_validation(REFERENCE, best)
        means = {value: self.mean_validation(method.name, value) for value in order}
        for number, value in enumerate(order, start=1):
            if means[value] is None or bar is None or not_below(means[value], bar):
                return order[:number]
        most = max(order, key=means.get)
        return [value for value in order if value != most] + [most]

    def runs_of(self, name: str, value) -> dict[int, Outcome]:
        """The complete runs of a value by seed."""
        found = {seed: self.outcome(name, value, seed) for seed in self.plan.seeds}
        return {seed: outcome for seed, outcome in found.items() if outcome is not None}

    def mean_validation(self, name: str, value) -> float | None:
        """Pass@1 over all seeds, if they are there."""
        outcomes = self.runs_of(name, value).values()
        if len(outcomes) < len(self.plan.seeds):
            return None
        return statistics.mean(outcome.figures["validation"]["pass@1"] for outcome in outcomes)

    def planned(self) -> int:
        """How many runs it takes as far as is known: in place of a value that is given up another gets all seeds."""
        given_up = sum(max(len(self.tried(method)) - 1, 0) for method in self.plan.methods.values())
        return self.plan.jobs + given_up * (len(self.plan.seeds) - 1)

    def known(self) -> list[tuple[str, object, int]]:
        """(method, value, seed) of every run that is known to be needed."""
        first, *others = self.plan.seeds
        runs = [(UNTRAINED, None, seed) for seed in self.plan.seeds]
        runs += [(method.name, value, first) for method in self.plan.methods.values() for value in method.values]
        for method in self.plan.methods.values():
            runs += [(method.name, value, seed) for value in self.tried(method) for seed in others]
        return runs

    def wanted(self) -> list[Job]:
        """The jobs that are needed and not complete, the part of them that is left."""
        missing = [self.plan.job(*run) for run in self.known() if self.outcome(*run) is None]
        return [self._rest(job) for job in missing]

    def _rest(self, job: Job) -> Job:
        """A run that was stopped between its last checkpoint and its validation needs the validation alone."""
        tracker = job.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        if not tracker.is_file() or tracker.read_text().strip() != str(self.plan.steps):
            return job
        return Job(job.name, job.folder, (*job.arguments, "trainer.val_only=true", "trainer.val_before_train=true"))

    def finished(self, run: Running) -> None:
        """Note what became of a run that ended, and write the table anew."""
        status = run.process.returncode
        self._outcomes.pop(run.job.name, None)  # of before its end
        complete = run.job.name not in {job.name for job in self.wanted()}
        if status == 0 and complete:
            self.record(run.job)
            self._ratios.append(run.seconds / self.expected_s(trained=not run.job.name.startswith(UNTRAINED)))
            say(f"{run.job.name} is done in {clock(run.seconds)}")
        else:
            reason = run.reason() if status else "it ended without all completions of its last validation"
            self.failed[run.job.name] = reason
            self._outcomes.pop(run.job.name, None)
            say(f"{run.job.name} FAILED: {reason}; its log: {run.job.log}")
        write(self)

    # -- progress -----------------------------------------------------------------------------------------------

    def expected_s(self, trained: bool) -> float:
        """Seconds of a run from the measured costs."""
        steps = self.plan.steps if trained else 0
        completions = self.plan.samples * sum(map(len, self._prompts.values()))
        return START_S + steps * self.plan.step_s + completions * COMPLETION_S

    def seconds_left(self, running: Sequence[Running], slots: int) -> float:
        """From the measured costs, corrected by how long the runs so far took."""
        ratio = statistics.mean(self._ratios) if self._ratios else 1.0
        open_jobs = self.planned() - len(self._outcomes) - len(self.failed)
        untrained = sum(self.outcome(UNTRAINED, None, seed) is None for seed in self.plan.seeds)
        trained = max(open_jobs - untrained, 0)
        work = ratio * (untrained * self.expected_s(trained=False) + trained * self.expected_s(trained=True))
        return max(work - sum(run.seconds for run in running), 0) / slots


def diagnostics(metrics: list[dict]) -> dict[str, float]:
    """The means of `DIAGNOSTICS` over the steps of a run, those that it has."""
    names = dict.fromkeys(name for step in metrics for name in step if name.startswith(DIAGNOSTICS))
    return {name: statistics.mean(step[name] for step in metrics if name in step) for name in names}


def say(text: str) -> None:
    print(f"table: {text}", flush=True)


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


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
        done = f"{len(table._outcomes)}/{table.planned()} runs of {table.plan.steps} steps done"
        say(f"{done}; {at_work}; about {left} left")

    return show


# --- what is written ---


def summary(outcomes: list[Outcome]) -> dict[str, list[float | None]]:
    """[mean, sample standard deviation over seeds] of each figure on the test split; no deviation of one seed."""
    figures = [outcome.figures["test"] for outcome in outcomes]
    columns = {name: [entry[name] for entry in figures] for name in figures[0]}
    for name in ("seconds_per_step", "discarded_prompts"):
        if None not in (values := [getattr(outcome, name) for outcome in outcomes]):
            columns[name] = values
    return {
        name: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None]
        for name, values in columns.items()
    }


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
                "test": summary(list(runs.values())),
                "seeds": {str(seed): outcome._asdict() for seed, outcome in runs.items()},
                "grid": [{"value": v, **outcome._asdict()} for v, outcome in table.grid(method).items()],
                "given_up": [
                    {"label": method.label(v), "test": summary(list(table.runs_of(name, v).values()))} for v in given_up
                ],
            }
    means = {name: {key: mean for key, (mean, _) in row["test"].items()} for name, row in rows.items()}
    trained = {name: mean for name, mean in means.items() if name != UNTRAINED}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": command(),
        "settings": plan.settings() | {"seeds": plan.seeds, "prompts": {s: len(p) for s, p in table._prompts.items()}},
        "runs": {"done": len(table._outcomes), "planned": table.planned(), "failed": table.failed},
        "front": pareto.front({name: (mean["tokens"], mean["pass@1"]) for name, mean in means.items()}),
        "shortest": preference(trained, trained[REFERENCE]["pass@1"])[0] if REFERENCE in trained else None,
        "rows": rows,
    }


def hardware() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB of memory"


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


def markdown(found: dict) -> str:
    """table.md: the table and what one must know to read it."""
    settings, runs = found["settings"], found["runs"]
    lines = [
        "| method | knob | " + " | ".join(title for title, _, _ in COLUMNS) + " | seeds |",
        "|---|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for name, row in found["rows"].items():
        bold = "**" if name in found["front"] else ""
        cells = [with_deviation(row["test"].get(key), digits) for _, key, digits in COLUMNS]
        lines.append(f"| {bold}{name}{bold} | {row['label']} | " + " | ".join(cells) + f" | {len(row['seeds'])} |")
    shown = [run for row in found["rows"].values() for run in row["seeds"].values()]
    commits = sorted({commit for run in shown for commit in (run["commit"] or "").split()})
    machines = sorted({run["machine"] for run in shown if run["machine"]})
    seeds = ", ".join(map(str, settings["seeds"]))
    notes = [
        f"Written {found['date']}. " + " ".join(f"{machine}." for machine in machines),
        f"Command: `{found['command']}`. Commit of the runs: {', '.join(commits) or 'none'}.",
        f"{settings['steps']} training steps; seeds {seeds}: mean ± sample standard deviation over them. Test split: "
        f"{settings['prompts']['test']} prompts, {settings['samples']} sample(s) each at temperature 1.",
        "Bold: on the Pareto front, no other row has fewer tokens at no lower Pass@1, or a higher Pass@1 at no more "
        "tokens. Ratio: Pass@1 / mean tokens. The minimum is the shortest trace that writes every addition once. "
        "Seconds of a step are a median; a run may have shared the machine with another. Discarded: prompts per step "
        "that dynamic sampling threw away with all their rollouts, most because these were all right or all wrong, "
        "some because the batch was full.",
    ]
    if found["shortest"]:
        notes.append(
            f"Fewest tokens of all methods at most {100 * TOLERANCE:g} point below GRPO's Pass@1: {found['shortest']}."
        )
    if "validation" in settings["splits"]:
        notes.append(
            "Knobs: each value was trained with the first seed, and chosen on the validation split: the fewest tokens "
            f"among those at most {100 * TOLERANCE:g} point below GRPO's Pass@1, else the highest Pass@1. A choice "
            "whose mean over all seeds is further below there was given up for the next; if none holds, the highest "
            "mean stands."
        )
        for name, row in found["rows"].items():
            for lost in row["given_up"]:
                accuracy, tokens = (with_deviation(lost["test"][key], n) for key, n in (("pass@1", 3), ("tokens", 1)))
                notes.append(f"Given up: {name} {lost['label']}; on the test split {accuracy}, {tokens} tokens.")
    else:
        notes.append("Each method at its default, not tuned.")
    if settings["overrides"]:
        notes.append(f"All runs with {' '.join(settings['overrides'])}.")
    if runs["done"] < runs["planned"]:
        notes.append(f"**Not complete: {runs['done']} of {runs['planned']} runs are done.**")
    notes += [f"Failed: {name}: {reason}" for name, reason in runs["failed"].items()]
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def with_deviation(entry: list | None, digits: int) -> str:
    if entry is None:
        return ""
    mean, deviation = entry
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def write(table: Table) -> dict:
    """results.json and table.md, each whole or not at all."""
    found = results(table)
    write_whole(table.plan.out / "results.json", json.dumps(found, indent=1) + "\n")
    write_whole(table.plan.out / "table.md", markdown(found))
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text)
    os.replace(partial, path)


# --- the command ---


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, no tuning: within 30 minutes")
    parser.add_argument("--methods", help="some of table.yaml, as a,b; GRPO, which tuning needs, is added")
    parser.add_argument("--steps", type=int, help="training steps of each run")
    parser.add_argument("--samples", type=int, help="completions per prompt of the evaluation")
    parser.add_argument("--seeds", help="as 0,1,2; the first is the one that knobs are chosen with")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side where memory allows, default 2")
    parser.add_argument("--out", help="output folder, default runs/table or runs/table-quick")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to every run")
    return parser.parse_intermixed_args(arguments)


def open_folder(plan: Plan) -> None:
    """Make the output folder with its data; refuse one of a table with other settings.

    Raises:
        ValueError: in one line.
    """
    file, settings = plan.out / "settings.json", json.loads(json.dumps(plan.settings()))
    if plan.out.exists() and not plan.out.is_dir():
        raise ValueError(f"--out: {plan.out} is a file; choose a folder.")
    plan.out.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        try:
            before = {name: json.loads(file.read_text())[name] for name in settings}
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
        prepare("verbose_arithmetic", plan.out / "data")
        write_evaluation_file(plan)


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
        # Each run has a Ray of its own, where with an address all would join one, and the data beside the results.
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
            say(f"stopped; the same command goes on: {command()}")
            return stopped.code


def earlier_rows(plan: Plan) -> set[str]:
    """The rows of the table that stands in the output folder."""
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
        f"{len(table._outcomes)} are done already; about {left} for the others, {slots} side by side, if this machine "
        f"is like the one of benchmarks/README.md; everything lands in {plan.out}"
    )
    if left_out := earlier_rows(plan) - {UNTRAINED, *plan.methods}:
        say(f"this table is without {', '.join(sorted(left_out))}, which an earlier one in this folder had")
    if waiting:
        run_all(table.wanted, table.finished, table.failed, shower(table, slots), train, slots, interval_s)
    found = write(table)
    if found["rows"]:
        pareto.draw(found["rows"], found["front"], plan.out / "pareto.png")
    print("\n" + markdown(found))
    say(f"written: {plan.out}/results.json, table.md, pareto.png")
    if table.failed:
        say(f"{len(table.failed)} run(s) failed, see above; the same command tries them again: {command()}")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
