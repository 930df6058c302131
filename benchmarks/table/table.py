"""The state of a table: what its complete runs showed, which values of the knobs are chosen, which runs are wanted."""

import contextlib
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

from benchmarks.table.fingerprint import fingerprint
from benchmarks.table.jobs import Job, Running
from benchmarks.table.kept import counts, kept_figures, oracle_front
from benchmarks.table.plan import REFERENCE, ROOT, UNTRAINED, Method, Plan, resolved_config
from iapo.launch.folder_lock import FolderInUse, lock
from iapo.metrics.file import read_metrics
from iapo.tools.evaluate import bootstrap, evaluate, of_prompts, read_prompts, read_samples

TOLERANCE = 0.01

# Expected seconds that a run takes to start, beyond those of its first step, and for each completion of its evaluation,
# with two runs side by side on two cores: benchmarks/README.md.
START_S, COMPLETION_S = 100.0, 0.036

# verl's counts of prompts, although it calls them samples.
DISCARDED = ("training/filter_groups/evicted_samples", "training/filter_groups/discarded_surplus_samples")
# What docs/findings.md explains results by: see docs/metrics.md.
DIAGNOSTICS = ("iapo/advantage_share/", "iapo/information_gain/", "iapo/exit_entropy/", "iapo/information_rate")


def preference(grid: dict, reference: float | None) -> list:
    """The values of a knob in the order in which the rule of `benchmarks.table.reproduce_table` takes them.

    Args:
        grid: figures of `iapo.tools.evaluate` on the validation split by value.
        reference: GRPO's Pass@1 there; None for GRPO itself.

    Returns:
        The accurate values, shortest first, or the most accurate one alone if there are none.
    """
    accurate = [] if reference is None else [v for v in grid if not_below(grid[v]["pass@1"], reference)]
    most = max(grid, key=lambda value: grid[value]["pass@1"])
    return sorted(accurate, key=lambda value: grid[value]["tokens"]) or [most]


def nearest(grid: dict, tokens: float):
    """The value of a knob whose figures have the most similar number of tokens; the first of several."""
    return min(grid, key=lambda value: abs(grid[value]["tokens"] - tokens))


def not_below(accuracy: float, reference: float) -> bool:
    """At most `TOLERANCE` below."""
    return accuracy >= reference - TOLERANCE - 1e-9


class Outcome(NamedTuple):
    """What a complete run showed: figures by split, and how long its steps took."""

    figures: dict[str, dict[str, float]]
    intervals: dict[str, tuple[float, float]]  # on the test split
    seconds_per_step: float | None
    commit: str | None
    machine: str | None  # hardware and versions
    discarded_prompts: float | None = None  # per step, whose rollouts dynamic sampling threw away
    diagnostics: dict[str, float] | None = None  # DIAGNOSTICS, means over the steps
    problems: dict[str, list[float]] | None = None  # `benchmarks.table.kept.counts` on the test split
    front: list[tuple[float, float]] | None = None  # `oracle_front` of the untrained model there


@dataclass
class Table:
    """The state of a plan: which of its runs are complete and which have failed."""

    plan: Plan
    config_of: Callable[[Job], str] = resolved_config
    _configs: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)  # of the time that a run took to what was expected

    def __post_init__(self):
        self.prompts = {split: read_prompts(self.plan.data_file(split)) for split in self.plan.splits}

    # -- which runs are there -----------------------------------------------------------------------------------

    def outcome(self, name: str, value, seed: int) -> Outcome | None:
        """Of a complete run, which was made as it would be now: by its record, or if all samples of its last validation
        are there. None of a failed one, even if another process completes it meanwhile: choices must not flip."""
        job = self.plan.job(name, value, seed)
        if job.name in self.failed:
            return None
        if job.name not in self.outcomes:
            if (outcome := self.recorded(job)) is not None:
                self.outcomes[job.name] = outcome
            elif (samples := self._last_validation(job, name)) is not None and self._made_as_now(job):
                self.outcomes[job.name] = self._evaluate(job, samples)
        return self.outcomes.get(job.name)

    def _record_file(self, job: Job) -> Path:
        return self.plan.out / "records" / f"{job.name}.json"

    def recorded(self, job: Job) -> Outcome | None:
        if not (file := self._record_file(job)).is_file():
            return None
        expected = self._fingerprint(self.config(job))
        try:
            record = json.loads(file.read_text())
            outcome = Outcome(**record["outcome"])
            return outcome if record["fingerprint"] == expected else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: is no record of a run ({error!r}); delete it.") from None

    def record(self, job: Job) -> None:
        """Keep what a complete run showed; not while it may still be alive."""
        record = {"fingerprint": self._fingerprint(self.config(job)), "outcome": self.outcomes[job.name]._asdict()}
        write_whole(self._record_file(job), as_json(record))

    def record_earlier(self) -> None:
        """Record runs that were complete when an earlier table was stopped."""
        for job in [self.plan.job(*run) for run in self.known()]:
            if job.name in self.outcomes and not self._record_file(job).is_file():
                with contextlib.suppress(FolderInUse), lock(job.folder / "lock"):
                    self.record(job)

    def _fingerprint(self, config: str) -> str:
        """Of a run's configuration, a config.yaml's text, and its evaluation, wherever output folder and code are."""
        places = {str(self.plan.out): "OUT", str(ROOT): "ROOT"}
        return fingerprint(yaml.load(config, Loader=yaml.CSafeLoader), self.plan.settings(), places)

    def _made_as_now(self, job: Job) -> bool:
        """Whether a run folder's config.yaml, which a killed run may have left half, says what it would say now."""
        try:
            return self._fingerprint((job.folder / "config.yaml").read_text()) == self._fingerprint(self.config(job))
        except (OSError, yaml.YAMLError, AttributeError):
            return False

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
        splits = {split: of_prompts(samples, prompts) for split, prompts in self.prompts.items()}
        whole = all(len(splits[s]) == len(self.prompts[s]) * self.plan.samples for s in splits)
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
            figures={
                split: evaluate(samples, ks) | kept_figures(self.plan.task, samples)
                for split, samples in splits.items()
            },
            intervals=bootstrap(splits["test"], ks),
            seconds_per_step=statistics.median(seconds) if seconds else None,
            commit=" ".join(dict.fromkeys(commits)) or None,
            machine=f"{hardware()}; {named}",
            discarded_prompts=statistics.mean(discarded) if discarded else None,
            diagnostics=diagnostics(metrics),
            problems=counts(self.plan.task, splits["test"]),
            front=oracle_front(self.plan.task, splits["test"]) if job.name.startswith(UNTRAINED) else None,
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
        reference = self.plan.methods[method.match or REFERENCE]
        *_, best = self.tried(reference) or [None]
        if best not in (references := self.grid(reference)):
            return []
        if method.match:
            return [nearest(figures, references[best].figures["validation"]["tokens"])]
        order = preference(figures, references[best].figures["validation"]["pass@1"])
        seeds = self.plan.seeds_of(method.name)
        bar = self.mean_validation(REFERENCE, best, seeds)
        means = {value: self.mean_validation(method.name, value, seeds) for value in order}
        for number, value in enumerate(order, start=1):
            if means[value] is None or bar is None or not_below(means[value], bar):
                return order[:number]
        most = max(order, key=means.get)
        return [value for value in order if value != most] + [most]

    def runs_of(self, name: str, value) -> dict[int, Outcome]:
        """The complete runs of a value by seed."""
        found = {seed: self.outcome(name, value, seed) for seed in self.plan.seeds_of(name)}
        return {seed: outcome for seed, outcome in found.items() if outcome is not None}

    def mean_validation(self, name: str, value, seeds: Sequence[int]) -> float | None:
        """Pass@1 over these seeds, if they are there."""
        outcomes = self.runs_of(name, value)
        if not outcomes.keys() >= set(seeds):
            return None
        return statistics.mean(outcomes[seed].figures["validation"]["pass@1"] for seed in seeds)

    def planned(self) -> int:
        """How many runs it takes as far as is known: in place of a value that is given up another gets all seeds."""
        return self.plan.jobs + sum(
            max(len(self.tried(method)) - 1, 0) * (len(self.plan.seeds_of(name)) - 1)
            for name, method in self.plan.methods.items()
        )

    def known(self) -> list[tuple[str, object, int]]:
        """(method, value, seed) of every run that is known to be needed."""
        first = self.plan.seeds[0]
        runs = [(UNTRAINED, None, seed) for seed in self.plan.seeds]
        runs += [(method.name, value, first) for method in self.plan.methods.values() for value in method.values]
        for name, method in self.plan.methods.items():
            runs += [(name, value, seed) for value in self.tried(method) for seed in self.plan.seeds_of(name)[1:]]
        return runs

    def done(self) -> int:
        """How many of those are complete. Others may have records too, which would hide what is missing."""
        return sum(self.outcome(*run) is not None for run in self.known())

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
        """Note what became of a run that ended."""
        status = run.process.returncode
        self.outcomes.pop(run.job.name, None)  # of before its end
        complete = run.job.name not in {job.name for job in self.wanted()}
        if status == 0 and complete:
            self.record(run.job)
            self.ratios.append(run.seconds / self.expected_s(trained=not run.job.name.startswith(UNTRAINED)))
            say(f"{run.job.name} is done in {clock(run.seconds)}")
        else:
            reason = run.reason() if status else "it ended without all completions of its last validation"
            self.failed[run.job.name] = reason
            self.outcomes.pop(run.job.name, None)
            say(f"{run.job.name} FAILED: {reason}; its log: {run.job.log}")

    # -- progress -----------------------------------------------------------------------------------------------

    def expected_s(self, trained: bool) -> float:
        """Seconds of a run from the measured costs."""
        steps = self.plan.steps if trained else 0
        completions = self.plan.samples * sum(map(len, self.prompts.values()))
        return START_S + steps * self.plan.step_s + completions * COMPLETION_S

    def seconds_left(self, running: Sequence[Running], slots: int) -> float:
        """From the measured costs, corrected by how long the runs so far took."""
        ratio = statistics.mean(self.ratios) if self.ratios else 1.0
        open_jobs = self.planned() - self.done() - len(self.failed)
        untrained = sum(self.outcome(UNTRAINED, None, seed) is None for seed in self.plan.seeds)
        trained = max(open_jobs - untrained, 0)
        work = ratio * (untrained * self.expected_s(trained=False) + trained * self.expected_s(trained=True))
        return max(work - sum(run.seconds for run in running), 0) / slots


def diagnostics(metrics: list[dict]) -> dict[str, float]:
    """The means of `DIAGNOSTICS` over the steps of a run, those that it has."""
    names = dict.fromkeys(name for step in metrics for name in step if name.startswith(DIAGNOSTICS))
    return {name: statistics.mean(step[name] for step in metrics if name in step) for name in names}


def hardware() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB of memory"


def as_json(value) -> str:
    """JSON with a line for each entry, and one for a list of numbers."""
    text = json.dumps(value, indent=1)
    return re.sub(r'\[\n([^\[\]{}"]+)\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", text) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text)
    os.replace(partial, path)


def say(text: str) -> None:
    print(f"table: {text}", flush=True)


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
