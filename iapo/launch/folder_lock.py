"""One process at a time in a folder."""

import fcntl
import os
import socket
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO


class FolderInUse(RuntimeError):
    """Another process works in a folder."""


def lock(path: Path) -> IO:
    """An open file with an exclusive lock, which lasts as long as any process has it open.

    The process that holds the lock may write into the file who it is; the error of a later one shows that.

    Raises:
        FolderInUse: another process has it.
        OSError: the file can't be made, or its file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        who = path.read_text().strip()
        raise FolderInUse(
            f"{path.parent} is in use by a run that is still alive{who and f' ({who})'}; wait for it or stop it."
        ) from None
    return file


def lock_run_dir(run_dir: Path) -> AbstractContextManager:
    """Lock a run folder, because the files of two runs in one folder would mix; only this process holds the lock.

    Raises:
        FolderInUse: there is one.
    """
    try:
        file = lock(run_dir / "run.lock")
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        return file
    except OSError as error:  # some network file systems
        warnings.warn(f"run_dir: {run_dir} can't be locked ({error}); start no second run in it.", stacklevel=2)
        return nullcontext()
