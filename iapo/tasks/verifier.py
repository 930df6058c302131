"""Whether an answer equals the ground truth, decided where a hostile answer does no harm.

math-verify decides, and runs sympy on text that a model wrote. That may loop for ever or ask for all of the memory.
It therefore runs in worker processes that can be killed. What needs no math-verify, two plain numbers or two equal
strings, is decided without a worker.
"""

import asyncio
import atexit
import importlib.util
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from decimal import Decimal

from pebble import ProcessPool

MAX_ANSWER_CHARS = 1000

# Few workers, because verl runs several reward processes per machine and each has a pool; two, so that one
# hostile answer does not block the others. Workers are replaced after some answers, because sympy's caches grow.
WORKERS = 2
ANSWERS_PER_WORKER = 500
WORKER_MEMORY_BYTES = 2 * 1024**3

_QUANTITY = re.compile(
    r"""
    (?:\\?\$)? \s*
    (?P<number> [+-]? (?: (?: [0-9]{1,3}(?:,[0-9]{3})+ | [0-9]+ ) (?:\.[0-9]*)? | \.[0-9]+ ) ) \s*
    (?: \\?\$ | (?P<unit> [A-Za-z]{3,} ) )? \.?
    """,
    re.VERBOSE,
)
# Words that change the number before them; any other word is taken for a unit.
_SCALE_WORDS = {"hundred", "thousand", "million", "billion", "trillion"}
_SCALE_WORDS |= {"dozen", "percent", "squared", "cubed", "factorial"}

_pool: ProcessPool | None = None
_pool_pid: int | None = None
_pool_lock = threading.Lock()


def plain_number(text: str) -> Decimal | None:
    """The exact value of `text` if it is one integer or decimal, else None.

    Allowed around the number, as in GSM8K's answers: thousands separators, a dollar sign, a full stop, one unit
    word of three letters or more ("18 dollars", but not "2 million"). Anything else, percent signs too, is left
    to math-verify.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or (match["unit"] or "").lower() in _SCALE_WORDS:
        return None
    return Decimal(match["number"].replace(",", ""))


def same_number(a: str, b: str) -> bool | None:
    """Whether two plain numbers (see `plain_number`) are equal, exactly; None if either is not one."""
    value_a, value_b = plain_number(a), plain_number(b)
    if value_a is None or value_b is None:
        return None
    return value_a == value_b


async def verdict(answer: str, gold: str, timeout_s: float) -> str:
    """Whether `answer` equals the ground truth `gold`: "right", "wrong", or why there is no verdict.

    A coroutine: others run while this one waits for a worker.

    Args:
        answer: as the model wrote it.
        gold: a number, or text for math mode (LaTeX, fraction, set, interval).
        timeout_s: seconds that a worker may spend on this answer; waiting for a free worker does not count.

    Returns:
        "right", "wrong", "unparsable" (math-verify finds no expression in the answer), "timeout", or
        "error: <what>" (a crash, memory, or a ground truth that is missing, too long or cannot be parsed).

    Raises:
        ImportError: math-verify is needed for this answer and not installed.
    """
    if not gold or len(gold) > MAX_ANSWER_CHARS:
        return f"error: ground truth of {len(gold)} characters"
    if answer == gold:
        return "right"
    same = same_number(answer, gold)
    if same is not None:
        return "right" if same else "wrong"
    # If this process is killed, nobody is left to time its workers out. Their own alarm then ends them.
    future = _running_pool().schedule(_judge, args=(answer, gold, 2 * timeout_s), timeout=timeout_s)
    try:
        # Cancelling this await cancels `future` too, and pebble then kills the worker if it works on it.
        return await asyncio.wrap_future(future)
    except asyncio.TimeoutError:
        return "timeout"
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
    warm_up = _judge("\\frac{1}{2}", "0.5", 300.0)
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


def _judge(answer: str, gold: str, alarm_s: float) -> str:
    """Runs in a worker, killed after alarm_s: "right", "wrong", "unparsable" or "error: <what>".

    Both texts are put in \\boxed{}, so that math-verify reads each as one whole expression; without it, it
    searches the text and finds 2 in "2\\sqrt{3}". Its own time-outs are off: they cannot interrupt C code.
    math-verify catches many errors inside verify() and says "not equal"; those are wrong answers here too.
    """
    from math_verify import parse, verify

    options = {"fallback_mode": "no_fallback", "parsing_timeout": None, "raise_on_error": True}
    signal.setitimer(signal.ITIMER_REAL, alarm_s)
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
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
