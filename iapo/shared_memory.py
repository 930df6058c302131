"""Remove the shared-memory segments and semaphores that a run leaves behind.

verl hands weights to vLLM through Python shared memory; when a run ends Ray kills its processes, and what they had in
/dev/shm would stay there for ever.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FOLDER = Path("/dev/shm")


@contextmanager
def removes_own_segments(patience_s: float = 10.0) -> Iterator[None]:
    """On exit, remove segments that appeared inside the context, belong to this user and that no process maps.

    Waits up to `patience_s` seconds for killed processes to let go of theirs. Other containers of the same user that
    share this /dev/shm but not the process list can't be told from ended ones; give each its own (docker's default).
    """
    before = _segments()
    try:
        yield
    finally:
        deadline = time.monotonic() + patience_s
        while new := _segments() - before:
            for path in new - _mapped():
                path.unlink(missing_ok=True)
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)


def _segments() -> set[Path]:
    own = set()
    for path in [*_FOLDER.glob("psm_*"), *_FOLDER.glob("sem.mp-*")]:
        with suppress(FileNotFoundError):  # another process may remove its own meanwhile
            if path.stat().st_uid == os.getuid():
                own.add(path)
    return own


def _mapped() -> set[Path]:
    """Segments that a living process maps; another run may share this machine."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:  # the process ended, or isn't ours
            continue
        mapped |= {Path(line.split()[-1]) for line in text.splitlines() if "/dev/shm/" in line}
    return mapped
