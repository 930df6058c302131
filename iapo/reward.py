"""The outcome reward of one completion: is its answer right, and is it written as asked? No verl import.

    r = r_answer + r_format,   r_answer = +1 right, -1 wrong,   r_format = +0.5 well formed, -0.5 not
                                                                  (IAPO, arXiv 2602.19049, section on rewards)

So r is one of +1.5, +0.5, -0.5, -1.5. `iapo.answer_format` says what is well formed and what the answer is,
`iapo.tasks.verifier` whether it is right.

To use it with verl, name the module and not the file, so that the workers can import it too:
`reward.custom_reward_function.path=pkg://iapo.reward reward.custom_reward_function.name=compute_score`.
"""

import logging
import math
from typing import Any

from iapo.answer_format import FORMATS, MARKERS, answer_blocks, extract_answer, format_ok
from iapo.tasks.reference import MAX_ANSWER_CHARS, references
from iapo.tasks.verifier import close_pool, decided, plain_number, same_number, verdict

__all__ = [
    "MARKERS",
    "MAX_ANSWER_CHARS",
    "answer_blocks",
    "close_pool",
    "compute_score",
    "extract_answer",
    "format_ok",
    "plain_number",
    "same_number",
    "score_dict",
]

logger = logging.getLogger(__name__)


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
    format: str = "tags",
) -> dict[str, float | str]:
    """r = +-1 (answer) +- 0.5 (format) of one completion (IAPO, arXiv 2602.19049, section on rewards).

    A coroutine: verl's reward loop scores other completions while this one waits for a worker.

    Args:
        data_source: unused; verl passes it.
        solution_str: the decoded completion, without the prompt and without special tokens.
        ground_truth: the right answer: a number, or text for math mode (LaTeX, fraction, set, interval); or a list of
            these, any of which is right. See `iapo.tasks.reference`.
        extra_info: unused; verl passes it.
        timeout_s: seconds of CPU time that a worker may spend on this answer and one reference; waiting for a free
            worker or for a core does not count. By the clock it has ten times as long, and half a minute.
        format: how a completion is laid out, a name of `iapo.answer_format.FORMATS`; a run passes `iapo.format`.

    Returns:
        score: r. acc: 1.0 right, 0.0 wrong. format: 1.0 well formed, else 0.0 (see `AnswerFormat.well_formed`).
        pred: the answer as written, at most MAX_ANSWER_CHARS characters; "" where there is none or several.
        verify_failure: 1.0 if the verifier gave no verdict; the answer then counts as wrong.
        failure_reason: why there was no verdict of right or wrong, else "". The completion's own fault:
            "no_answer" (no block, or an empty one), "several_answers", "too_long" (over MAX_ANSWER_CHARS),
            "unparsable" (math-verify finds no expression in it). The verifier's, with verify_failure 1.0:
            "timeout", "error: <what>" (crash, memory, or a ground truth that is missing, is no number, text or list of
            these, or cannot be parsed). Of several references the first without a verdict, unless another is right.

    Raises:
        ValueError: timeout_s is not a positive number of seconds, or there is no such format.
        ImportError: math-verify is needed for this answer and not installed.
    """
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s: {timeout_s} must be positive; give seconds, such as 5.0.")
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} must be one of {', '.join(FORMATS)}.")
    well_formed = FORMATS[format].well_formed(solution_str)
    blocks = FORMATS[format].answers(solution_str)
    if len(blocks) > 1:
        return score_dict(False, well_formed, "", "several_answers")
    answer = blocks[0].strip() if blocks else ""
    if not answer:
        return score_dict(False, well_formed, "", "no_answer")
    if len(answer) > MAX_ANSWER_CHARS:
        return score_dict(False, well_formed, answer[:MAX_ANSWER_CHARS], "too_long")
    found = await _found(answer, ground_truth, timeout_s)
    if found == "timeout" or found.startswith("error"):
        logger.warning("no verdict on answer %.80r: %s", answer, found)
    reason = "" if found in ("right", "wrong") else found
    return score_dict(found == "right", well_formed, answer, reason)


async def _found(answer: str, ground_truth: Any, timeout_s: float) -> str:
    """The verdict on an answer over all of its references: right if one says so, then the first failure."""
    try:
        golds = references(ground_truth)
    except ValueError as error:
        return f"error: ground truth {error}"
    if any(decided(answer, gold) == "right" for gold in golds):
        return "right"
    others = []
    for gold in golds:
        found = await verdict(answer, gold, timeout_s)
        if found == "right":
            return found
        others.append(found)
        if found == "timeout":  # a hostile answer takes this long for every reference
            break
    failures = [found for found in others if found not in ("wrong", "unparsable")]
    return (failures or [found for found in others if found == "wrong"] or others)[0]
