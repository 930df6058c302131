"""Remove the shared-memory segments that a run leaves behind.

verl hands weights to vLLM through Python shared memory; when a run ends its servers are killed and the segments stay
in /dev/shm for ever.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDER = Path("/dev/shm")


@contextmanager
def removes_own_segments() -> Iterator[None]:
    """On exit, remove segments that appeared inside the context, belong to this user and that no process maps."""
    before = _segments()
    try:
        yield
    finally:
        time.sleep(0.5)  # let killed processes unmap theirs
        for path in (_segments() - before) - _mapped():
            path.unlink(missing_ok=True)


def _segments() -> set[Path]:
    return {path for path in _FOLDER.glob("psm_*") if path.owner() == _user()} if _FOLDER.is_dir() else set()


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _mapped() -> set[Path]:
    """Segments that a living process maps; another run may share this machine."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:  # the process ended, or isn't ours
            continue
        mapped |= {Path(line.split()[-1]) for line in text.splitlines() if "/dev/shm/psm_" in line}
    return mapped
