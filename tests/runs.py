"""Real runs in the background, which leave no process and no shared memory behind."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from iapo.launch.shared_memory import mapped_segments, remove_unmapped
from iapo.metrics.file import read_metrics

SMALL = [
    "platform=cpu",
    "data.train_batch_size=4",
    "data.val_max_samples=8",
    "actor_rollout_ref.rollout.n=4",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.val_before_train=false",
]


class Run:
    """One `python -m iapo.train`; every process that it starts carries a marker in its environment."""

    def __init__(self, folder: Path, data_dir: Path, *overrides: str):
        self.folder = folder
        self.marker = uuid.uuid4().hex
        folder.mkdir(exist_ok=True)
        self.log = folder / f"{self.marker}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "iapo.train", *SMALL, f"run_dir={folder}", *overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"IAPO_TEST_RUN": self.marker, "IAPO_DATA_DIR": str(data_dir)},
                start_new_session=True,
            )

    def wait(self, timeout: float = 600) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            alive = [(p.pid, p.status(), p.cmdline()[:1]) for p in self.processes()]
            raise AssertionError(f"waited {timeout} s; alive: {alive}\n{self.tail(200)}") from None

    def wait_for(self, condition, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"the run ended early:\n{self.tail()}"
            assert time.monotonic() < deadline, f"waited {timeout} s:\n{self.tail()}"
            time.sleep(0.2)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def metrics(self) -> dict[int, dict]:
        return dict(read_metrics(self.folder / "metrics.jsonl"))

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("IAPO_TEST_RUN") == self.marker and process.status() != "zombie":
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def kill(self) -> None:
        """Stop every process of the run and remove the shared memory that they had mapped."""
        processes = self.processes()
        segments = mapped_segments(process.pid for process in processes)
        for process in processes:
            process.kill()
        self.wait_until_gone()
        remove_unmapped(segments, patience_s=5)

    def wait_until_gone(self, timeout: float = 30) -> list[psutil.Process]:
        deadline = time.monotonic() + timeout
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left


@contextmanager
def runs(parent: Path, data_dir: Path) -> Iterator:
    """Start runs; at the end stop what is left of them, by process id, and remove the shared memory they made."""
    started = []

    def start(*overrides, folder="run"):
        started.append(Run(parent / folder, data_dir, *overrides))
        return started[-1]

    try:
        yield start
    finally:
        for run in started:
            run.kill()


def finished(run: Run, timeout: float = 600) -> Run:
    assert run.wait(timeout) == 0, run.tail()
    assert not run.wait_until_gone(), "processes are left behind"
    return run


def segments() -> set[Path]:
    """All shared memory of Python's on the machine."""
    return set(Path("/dev/shm").glob("psm_*"))


def left_behind(before: set[Path], patience_s: float = 15) -> set[Path]:
    """Shared memory that wasn't there `before` and that no process maps; other runs of the machine map theirs."""
    deadline = time.monotonic() + patience_s
    while (left := segments() - before - mapped_segments(psutil.pids())) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left
