"""Remove the shared memory and semaphores that a run would leave on the machine.

verl gives weights to vLLM through Python shared memory. When a run ends, Ray kills its processes, and their files in
/dev/shm would stay there for ever. The names are random, and other runs may share the machine. So only files that a
process of this run was seen to map are removed.
"""

import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from iapo.verl_adapter.vllm_plugin import RUN_ID


@contextmanager
def removes_own_segments(interval_s: float = 3.0, patience_s: float = 10.0) -> Iterator[None]:
    """Watch what this process's descendants map in /dev/shm and, on exit, remove it once nobody maps it.

    Args:
        interval_s: seconds between looks.
        patience_s: seconds to wait on exit until killed processes have unmapped theirs.
    """
    os.environ[RUN_ID] = uuid.uuid4().hex
    seen: set[Path] = set()
    done = threading.Event()

    def watch():
        while not done.wait(interval_s):
            seen.update(mapped_segments(run_processes(os.environ[RUN_ID])))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        remove_unmapped(seen, patience_s)


def run_processes(run_id: str) -> list[int]:
    """Ids of the living processes that were started with this run id in their environment."""
    wanted = f"{RUN_ID}={run_id}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it ended, or belongs to somebody else
            continue
    return found


def mapped_segments(processes: Iterable[int | str]) -> set[Path]:
    """Python's shared memory and semaphores that these processes map."""
    mapped = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/maps").read_text().splitlines()
        except OSError:
            continue
        mapped |= {Path(line.split()[-1]) for line in lines if "/dev/shm/psm_" in line or "/dev/shm/sem.mp-" in line}
    return {path for path in mapped if path.parent == Path("/dev/shm")}  # an unlinked one ends in "(deleted)"


def remove_unmapped(segments: set[Path], patience_s: float) -> None:
    """Unlink these once no process maps them; those still mapped after `patience_s` seconds stay."""
    deadline = time.monotonic() + patience_s
    while left := {path for path in segments if path.exists()}:
        everyone = [folder.name for folder in Path("/proc").glob("[0-9]*")]
        for path in left - mapped_segments(everyone):
            path.unlink(missing_ok=True)
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
