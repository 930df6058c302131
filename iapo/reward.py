"""The outcome reward of one completion: is its answer right, and is it written as asked? No verl import.

    r = r_answer + r_format,   r_answer = +1 right, -1 wrong,   r_format = +0.5 well formed, -0.5 not
                                                                  (IAPO, arXiv 2602.19049, section on rewards)

so r is one of +1.5, +0.5, -0.5, -1.5. Rightness is decided by math-verify, which runs sympy on text that a
model wrote: it may loop for ever or ask for all of the memory. It therefore runs in worker processes that can
be killed, and everything that can be decided without it (two plain numbers, two equal strings) is.

To use it with verl, name the module and not the file, so that the workers can import it too:
`reward.custom_reward_function.path=pkg://iapo.reward reward.custom_reward_function.name=compute_score`.
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
from typing import Any

from pebble import ProcessPool

logger = logging.getLogger(__name__)

MARKERS = ("<think>", "</think>", "<answer>", "</answer>")
MAX_ANSWER_CHARS = 1000

# Few workers, because verl runs several reward processes per machine and each has a pool; two, so that one
# hostile answer does not block the others. Recycled, because sympy's caches grow.
_WORKERS = 2
_TASKS_PER_WORKER = 500
_WORKER_MEMORY_BYTES = 2 * 1024**3

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


def format_ok(text: str) -> bool:
    """Whether `text` is `<think> ... </think>\\n<answer> ... </answer>` and nothing else.

    Source: IAPO, arXiv 2602.19049, section on rewards. Exactly: each of the four markers occurs once in the
    whole text; only white space stands before `<think>` and after `</answer>`; one newline, and nothing else,
    stands between `</think>` and `<answer>`. That newline is part of the exit probe too: the format that is
    rewarded is the one that the probe asks for.

    Degenerate cases: the two blocks may be empty (an empty answer is wrong, not ill-formed); a completion
    whose opening `<think>` is in the prompt is not well formed.
    """
    text = text.strip()
    return (
        all(text.count(marker) == 1 for marker in MARKERS)
        and text.startswith("<think>")
        and "</think>\n<answer>" in text
        and text.endswith("</answer>")
    )


def answer_blocks(text: str) -> list[str]:
    """The contents of all `<answer> ... </answer>` blocks, in order; a stray marker alone makes no block."""
    before_each_end = text.split("</answer>")[:-1]
    return [part.rsplit("<answer>", 1)[1] for part in before_each_end if "<answer>" in part]


def extract_answer(text: str) -> str | None:
    """The content of the answer block, stripped; None where there is no block or more than one.

    Several blocks are not "the last one wins": that would pay a model for guessing more than once.
    """
    blocks = answer_blocks(text)
    return blocks[0].strip() if len(blocks) == 1 else None


def plain_number(text: str) -> Decimal | None:
    """The exact value of `text` if it is one integer or decimal, else None.

    Allowed around the number, as GSM8K's answers have them: thousands separators, a dollar sign, a full stop,
    one unit word of three letters or more ("18 dollars", but not "2 million"). Anything else, percent signs
    too, is left to math-verify.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or (match["unit"] or "").lower() in _SCALE_WORDS:
        return None
    return Decimal(match["number"].replace(",", ""))


def same_number(a: str, b: str) -> bool | None:
    """Whether two plain numbers (see `plain_number`) are equal, exactly; None where either is not one."""
    value_a, value_b = plain_number(a), plain_number(b)
    if value_a is None or value_b is None:
        return None
    return value_a == value_b


def score_dict(correct: bool, well_formed: bool, pred: str, reason: str) -> dict[str, float | str]:
    """The result of `compute_score`: always the same keys, numbers as floats, so that verl averages them."""
    verifier_failed = reason == "timeout" or reason.startswith("error")
    return {
        "score": (1.0 if correct else -1.0) + (0.5 if well_formed else -0.5),
        "acc": float(correct),
        "format": float(well_formed),
        "pred": pred,
        "verify_failure": float(verifier_failed),
        "failure_reason": reason,
    }


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict | None = None,
    *,
    timeout_s: float = 5.0,
) -> dict[str, float | str]:
    """r = +-1 (answer) +- 0.5 (format) of one completion (IAPO, arXiv 2602.19049, section on rewards).

    A coroutine: verl's reward loop scores other completions while this one waits for a worker.

    Args:
        data_source: unused; verl passes it.
        solution_str: the decoded completion, without the prompt and without special tokens.
        ground_truth: the right answer: a number, or text for math mode (LaTeX, fraction, set, interval).
        extra_info: unused; verl passes it.
        timeout_s: seconds that a worker may spend on this answer; waiting for a free worker does not count.

    Returns:
        score: r. acc: 1.0 right, 0.0 wrong. format: 1.0 well formed, else 0.0 (see `format_ok`).
        pred: the answer as written, at most MAX_ANSWER_CHARS characters; "" where there is none or several.
        verify_failure: 1.0 if the verifier gave no verdict; the answer then counts as wrong.
        failure_reason: why there was no verdict of right or wrong, else "". The completion's own fault:
            "no_answer" (no block, or an empty one), "several_answers", "too_long" (over MAX_ANSWER_CHARS),
            "unparsable" (math-verify finds no expression in it). The verifier's, with verify_failure 1.0:
            "timeout", "error: <what>" (crash, memory, or a ground truth that is missing or cannot be parsed).

    Raises:
        ValueError: timeout_s is not positive.
        ImportError: math-verify is needed for this answer and not installed.
    """
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be positive, got {timeout_s}; give seconds, such as 5.0")
    well_formed = format_ok(solution_str)
    blocks = answer_blocks(solution_str)
    if len(blocks) > 1:
        return score_dict(False, well_formed, "", "several_answers")
    answer = blocks[0].strip() if blocks else ""
    if not answer:
        return score_dict(False, well_formed, "", "no_answer")
    if len(answer) > MAX_ANSWER_CHARS:
        return score_dict(False, well_formed, answer[:MAX_ANSWER_CHARS], "too_long")
    gold = "" if ground_truth is None else str(ground_truth).strip()
    verdict = await _verdict(answer, gold, timeout_s)
    if verdict == "timeout" or verdict.startswith("error"):
        logger.warning("no verdict on answer %.80r: %s", answer, verdict)
    reason = "" if verdict in ("right", "wrong") else verdict
    return score_dict(verdict == "right", well_formed, answer, reason)


def close_pool() -> None:
    """Ends the workers and waits for them; the next call of `compute_score` that needs them starts new ones.

    Called at exit by itself; and workers end when the process that started them was killed.
    """
    global _pool
    with _pool_lock:
        if _pool is not None and _pool_pid == os.getpid():
            _pool.stop()
            _pool.join()
        _pool = None


atexit.register(close_pool)


async def _verdict(answer: str, gold: str, timeout_s: float) -> str:
    """ "right", "wrong", or the failure reason of `compute_score`."""
    if not gold or len(gold) > MAX_ANSWER_CHARS:
        return f"error: ground truth of {len(gold)} characters"
    if answer == gold:
        return "right"
    same = same_number(answer, gold)
    if same is not None:
        return "right" if same else "wrong"
    # The workers' own alarm ends them when their parent was killed and nobody is left to time them out.
    future = _get_pool().schedule(_judge, args=(answer, gold, 2 * timeout_s), timeout=timeout_s)
    try:
        # Cancelling this await cancels `future` too, and pebble then kills the worker if it is at work on it.
        return await asyncio.wrap_future(future)
    except asyncio.TimeoutError:
        return "timeout"
    except Exception as error:  # whatever ends a worker or the pool is a counted failure
        return f"error: {type(error).__name__}"


def _get_pool() -> ProcessPool:
    """This process's pool, started when first needed, and again after a fork or after it broke."""
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
            max_workers=_WORKERS,
            max_tasks=_TASKS_PER_WORKER,
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
    _limit_memory(_WORKER_MEMORY_BYTES)


def _limit_memory(headroom_bytes: int) -> None:
    """Bounds this process's address space to what it has plus `headroom_bytes`; no effect outside Linux."""
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
