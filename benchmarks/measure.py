"""Interleaved timing, peak memory and tables, for the benchmarks."""

import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch


def interleaved(functions: dict[str, Callable], repeats: int, device: str, say: str = "") -> dict[str, float]:
    """Median seconds of each, one after the other in every round, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.monotonic()
    for round_number in range(repeats + 1):  # the first only warms up
        for name, function in functions.items():
            synchronize(device)
            before = time.perf_counter()
            function()
            synchronize(device)
            if round_number:
                times[name].append(time.perf_counter() - before)
        left = (time.monotonic() - start) / (round_number + 1) * (repeats - round_number)
        print(f"\r{say}: round {round_number}/{repeats}, {left:.0f} s left   ", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 70 + "\r", end="", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mib(prepare: Callable[[], Callable], device: str) -> float:
    """MiB that a function takes at its peak beyond what was there before, the model included.

    On a GPU by torch's own count. On a CPU by the resident set of a process of its own, so `prepare`, which makes the
    function, must be picklable.
    """
    if device == "cuda":
        function = prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_of_process, args=(prepare, sender))
    process.start()
    sender.close()  # so that a process that dies ends the wait
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measured process ended with status {process.exitcode}, out of memory?") from None
    finally:
        process.join()


def _peak_of_process(prepare, sender) -> None:
    torch.set_num_threads(1)
    function = prepare()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading and importing
    before = _status_kib("VmRSS")
    function()
    sender.send((_status_kib("VmHWM") - before) / 2**10)


def _status_kib(name: str) -> int:
    """A line of /proc/self/status, where VmRSS is resident now and VmHWM was at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        return "| " + " | ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def machine(device: str) -> str:
    """Date, hardware and versions, in one line."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return f"{time.strftime('%Y-%m-%d')}, {hardware}, {torch.get_num_threads()} thread(s), {versions}"
