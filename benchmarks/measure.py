"""Interleaved timing, peak memory and tables, for the benchmarks."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from itertools import accumulate

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


def peak_mib(function: Callable[[], object], device: str) -> float:
    """MiB of tensors, torch's own scratch included, that a function holds at its peak beyond what was there before.

    By torch's count on either device, which is the same every time. The resident set of a process is larger, by what
    its allocator keeps of freed tensors.
    """
    function()  # what torch allocates once
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes lines of its own
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes), default=0) / 2**20


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
