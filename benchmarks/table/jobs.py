"""Training runs side by side, each in a process and a run folder of its own.

And in a Ray of its own, unless RAY_ADDRESS is in the environment.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from iapo.launch.folder_lock import FolderInUse, lock
from iapo.metrics.file import read_metrics

# What a run of the embedded model takes at its peak on a CPU, with a margin.
GIB_PER_JOB = 6.5
# Seconds that a stopped run has to end Ray and remove its shared memory before it is killed.
PATIENCE_S = 120
STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """One run: its folder, and the arguments of iapo.train that make it, run_dir included."""

    name: str
    folder: Path
    arguments: tuple[str, ...]

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    def steps_done(self) -> int:
        path = self.folder / "metrics.jsonl"
        return max((step for step, _ in read_metrics(path)), default=0) if path.is_file() else 0


class Running:
    """A started job.

    The lock of its folder is held by the run itself, so it outlives whoever started it: a second start while the run
    is still alive, after a kill -9 of the first starter say, is refused.

    Raises:
        FolderInUse: the folder's run is alive.
    """

    def __init__(self, job: Job, command: Sequence[str]):
        self.job, self.start = job, time.monotonic()
        job.folder.mkdir(parents=True, exist_ok=True)
        with lock(job.folder / "lock") as held, job.log.open("a") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C of the terminal must not reach the run's workers before the run itself.
            self.process = subprocess.Popen(
                [*command, *job.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[held.fileno()],
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def reason(self) -> str:
        """Why it failed: what iapo.train says last, or whatever the log ends with."""
        text = self.job.log.read_bytes()[self._log_start :].decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("iapo.train: ")] or lines
        status = f"exit status {self.process.returncode}"
        return f"{said[-1].removeprefix('iapo.train: ')} ({status})" if said else status


def run_all(
    wanted: Callable[[], list[Job]],
    finished: Callable[[Running], None],
    failed: dict[str, str],
    progress: Callable[[list[Running]], None],
    command: Sequence[str],
    slots: int,
    interval_s: float = 1.0,
) -> None:
    """Run jobs, at most `slots` at a time, until no more is wanted.

    A signal that raises stops all runs politely first: each gets SIGTERM and time to clean up.

    Args:
        wanted: the jobs that are known to be needed and not complete, in order; asked again whenever one ended.
        finished: called with every run that ended.
        failed: why jobs failed, by name; they are not started again. `finished` fills it, and a folder in use does.
        progress: called every `interval_s` seconds.
        command: the command that takes a job's arguments.
    """
    running: list[Running] = []

    def open_jobs() -> list[Job]:
        busy = {run.job.name for run in running} | failed.keys()
        return [job for job in wanted() if job.name not in busy]

    try:
        waiting = open_jobs()
        while waiting or running:
            while waiting and len(running) < slots:
                job = waiting.pop(0)
                try:
                    with deferred_signals():  # one that came in between would lose the run that was just started
                        running.append(Running(job, command))
                except FolderInUse as error:
                    failed[job.name] = str(error)
                    waiting = open_jobs()  # others may be wanted in its place
            progress(running)
            time.sleep(interval_s)
            ended = [run for run in running if run.process.poll() is not None]
            for run in ended:
                running.remove(run)
                finished(run)
            if ended:
                waiting = open_jobs()
    finally:
        stop(running)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let a stop that arrives meanwhile wait for the end of the block."""
    arrived: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in arrived[:1]:
            signal.raise_signal(number)


def stop(running: list[Running]) -> None:
    """End runs politely, or after `PATIENCE_S` by force; a second Ctrl-C doesn't cut this short."""
    if not running:
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    for run in running:
        run.process.terminate()
    deadline = time.monotonic() + PATIENCE_S
    for run in running:
        try:
            run.process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
    for number, handler in previous.items():
        signal.signal(number, handler)


def slots_by_memory(most: int, available_bytes: int) -> int:
    """How many jobs fit side by side; at least one, which may have to swap."""
    return max(1, min(most, int(available_bytes / 2**30 / GIB_PER_JOB)))
