"""Stops: SIGTERM that unwinds as Ctrl-C does, and which signals have arrived, whatever handlers are installed."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is Ctrl-C."""


def raise_on_sigterm() -> None:
    """Let SIGTERM unwind this process, which removes its temporary files, instead of ending it on the spot.

    A second one is ignored: it must not cut the clean-up short. Only for the main thread.
    """

    def terminate(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


@contextmanager
def recorded_signals() -> Iterator[Callable[[], set[int]]]:
    """Yield a function that returns the numbers of all signals that had a Python handler and arrived so far.

    A handler of our own is not enough. Ray installs another while it starts, and an exception of either is lost if the
    signal arrives inside a destructor. Only for the main thread.
    """
    reader, writer = socket.socketpair()
    seen: set[int] = set()

    def arrived() -> set[int]:
        with suppress(BlockingIOError):  # nothing new
            seen.update(reader.recv(4096))
        return seen

    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield arrived
        finally:
            signal.set_wakeup_fd(previous)
