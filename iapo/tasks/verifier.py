"""Whether an answer equals the ground truth, decided where a hostile answer does no harm.

math-verify decides, and runs sympy on text that a model wrote. That may loop for ever or ask for all of the memory.
It therefore runs in worker processes that can be killed. What needs no math-verify, two plain numbers or two equal
strings, is decided without a worker (`decided`). Units are `iapo.tasks.quantity`'s in both cases.
"""

import asyncio
import atexit
import importlib.util
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from pebble import ProcessExpired, ProcessPool

from iapo.tasks.quantity import (
    differs,
    for_math_verify,
    misread,
    plain_number,
    quantity,
    same_number,
    tidy,
    units_agree,
    whole_number_of_another_base,
    words,
)
from iapo.tasks.reference import MAX_ANSWER_CHARS
from iapo.tasks.wrapping import balanced, bare

__all__ = ["MAX_ANSWER_CHARS", "close_pool", "decided", "plain_number", "same_number", "verdict"]

# Few workers, because verl runs several reward processes per machine and each has a pool; two, so that one
# hostile answer does not block the others. Workers are replaced after some answers, because sympy's caches grow.
WORKERS = 2
ANSWERS_PER_WORKER = 500
WORKER_MEMORY_BYTES = 2 * 1024**3

# A worker may spend this much longer by the clock than in CPU time: other processes may have the cores.
WALL_FACTOR = 10
WALL_EXTRA_S = 30.0

_pool: ProcessPool | None = None
_pool_pid: int | None = None
_pool_lock = threading.Lock()


def decided(answer: str, gold: str) -> str | None:
    """The verdict that needs no math-verify; None where it is needed.

    It needs none for texts with one spelling, units or bases that differ, plain numbers and words.
    """
    spelling = bare(tidy(gold))
    if answer == gold or (spelling and bare(tidy(answer)) == spelling):
        return "right"
    if not balanced(answer):
        return "unparsable"
    a, g = quantity(answer), quantity(gold)
    if not units_agree(a, g) and (a.units or a.number is not None):
        return "wrong"
    if a.base != g.base:
        return "wrong"
    if g.base != 10:
        return "right" if a.text == g.text else "wrong"
    base_a, base_g = whole_number_of_another_base(answer), whole_number_of_another_base(gold)
    if base_a is not None or base_g is not None:
        return "right" if base_a == base_g else "wrong"
    if a.number is not None and g.number is not None:
        return "right" if a.number == g.number else "wrong"
    if g.text and bare(a.text) == bare(g.text):
        return "right"
    words_a, words_g = words(a.text), words(g.text)
    if words_a is not None and words_g is not None:
        return "right" if words_a == words_g else "wrong"
    if not g.text or misread(g.text):
        return "error: ground truth cannot be parsed"
    if not a.text or misread(a.text):
        return "unparsable"
    return "wrong" if differs(a.text, g.text) else None


async def verdict(answer: str, gold: str, timeout_s: float) -> str:
    """Whether `answer` equals the ground truth `gold`: "right", "wrong", or why there is no verdict.

    A coroutine: others run while this one waits for a worker.

    Args:
        answer: as the model wrote it.
        gold: a number, or text for math mode (LaTeX, fraction, set, interval).
        timeout_s: seconds of CPU time that a worker may spend on this answer. Waiting for a free worker or for a core
            does not count, but after WALL_FACTOR * timeout_s + WALL_EXTRA_S seconds by the clock the worker is killed
            in any case.

    Returns:
        "right", "wrong", "unparsable" (math-verify finds no expression in the answer), "timeout", or
        "error: <what>" (a crash, memory, or a ground truth that is missing, too long or cannot be parsed).

    Raises:
        ImportError: math-verify is needed for this answer and not installed.
    """
    if not gold or len(gold) > MAX_ANSWER_CHARS:
        return f"error: ground truth of {len(gold)} characters"
    found = decided(answer, gold)
    if found is not None:
        return found
    texts = [for_math_verify(quantity(text).text) for text in (answer, gold)]
    return await in_worker(_judge, texts, timeout_s)


async def in_worker(function: Callable, arguments: Sequence, timeout_s: float) -> str:
    """What a worker's `function` returns; "timeout" or "error: <what>" if it returns nothing."""
    wall_s = WALL_FACTOR * timeout_s + WALL_EXTRA_S
    future = _running_pool().schedule(_limited, args=(function, arguments, timeout_s, wall_s), timeout=wall_s)
    try:
        # Cancelling this await cancels `future` too, and pebble then kills the worker if it works on it.
        return await asyncio.wrap_future(future)
    except asyncio.TimeoutError:
        return "timeout"
    except ProcessExpired as error:
        ended_by = {-signal.SIGPROF, -signal.SIGALRM}
        return "timeout" if error.exitcode in ended_by else f"error: {type(error).__name__}"
    except Exception as error:  # whatever ends a worker or the pool is a counted failure
        return f"error: {type(error).__name__}"


def close_pool() -> None:
    """End the workers and wait for them; the next answer that needs one starts new ones.

    Called at exit by itself. Workers also end after the process that started them was killed.
    """
    global _pool
    with _pool_lock:
        if _pool is not None and _pool_pid == os.getpid():
            _pool.stop()
            _pool.join()
        _pool = None


atexit.register(close_pool)


def _running_pool() -> ProcessPool:
    """This process's pool; started when first needed, after a fork, and after it broke."""
    global _pool, _pool_pid
    with _pool_lock:
        if _pool is not None and _pool_pid == os.getpid():
            if _pool.active:
                return _pool
            _pool.stop()
            _pool.join()
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("math-verify is not installed; run: pip install math-verify")
        # spawn, not fork: a Ray worker has threads, and a fork would copy the locks they hold.
        _pool = ProcessPool(
            max_workers=WORKERS,
            max_tasks=ANSWERS_PER_WORKER,
            initializer=_init_worker,
            context=multiprocessing.get_context("spawn"),
        )
        _pool_pid = os.getpid()
        return _pool


def _init_worker() -> None:
    """Runs once in every worker, before its first answer and outside any time-out."""
    # pebble's handler is Python code and waits for C code to return, up to 3 s in which no other answer is
    # served. The default action ends the process at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # math-verify warns that its own time-outs are off; they are, because pebble's take their place.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # The first call loads sympy and the LaTeX grammar; here, so that no answer is timed for it.
    warm_up = _judge("\\frac{1}{2}", "0.5")
    assert warm_up == "right", warm_up
    limit_memory(WORKER_MEMORY_BYTES)


def limit_memory(headroom_bytes: int) -> None:
    """Bound this process's address space to what it has plus `headroom_bytes`; no effect outside Linux."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as statm:
        used_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used_bytes + headroom_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _limited(function: Callable, arguments: Sequence, cpu_s: float, wall_s: float):
    """Runs in a worker: `function`, in a process that ends after cpu_s of CPU time or 2 * wall_s by the clock.

    The kernel ends it, by the default action of the two signals, so C code can't hold it up. Of the timers, PROF counts
    what this process computes, in user and in kernel mode. A resource limit would count over all of its answers. The
    clock is pebble's to watch. The second timer is for a worker whose parent was killed.
    """
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, 2 * wall_s)
    try:
        return function(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _judge(answer: str, gold: str) -> str:
    """Runs in a worker: "right", "wrong", "unparsable" or "error: <what>".

    Both texts are put in \\boxed{}, so that math-verify reads each as one whole expression; without it, it
    searches the text and finds 2 in "2\\sqrt{3}". It also searches for a number where it can't read the expression,
    and finds 5 in "It is not 5."; that is off. So is its list of units, which takes any \\text{} off a number:
    "5\\text{ million}" would be 5. Its own time-outs are off: they cannot interrupt C code.
    math-verify catches many errors inside verify() and says "not equal"; those are wrong answers here too.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    normalization = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    options = {
        "extraction_config": [LatexExtractionConfig(normalization_config=normalization)],
        "fallback_mode": "no_fallback",
        "parsing_timeout": None,
        "raise_on_error": True,
    }
    try:
        golds = parse(f"\\boxed{{{gold}}}", **options)
        if not golds:
            return "error: ground truth cannot be parsed"
        answers = parse(f"\\boxed{{{answer}}}", **options)
        if not answers:
            return "unparsable"
        return "right" if verify(golds, answers, timeout_seconds=None, raise_on_error=True) else "wrong"
    except Exception as error:
        # The name alone: printing sympy's message may take for ever, and some errors cannot be pickled.
        return f"error: {type(error).__name__}"
