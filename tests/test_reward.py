"""The reward: hand-computed scores, and what each verdict of the verifier gives. No worker is started here."""

import asyncio
import math
from decimal import Decimal

import numpy as np
import pytest

from iapo import reward
from iapo.reward import compute_score
from iapo.tasks.reference import references, unjudgeable

KEYS = {"score", "acc", "format", "pred", "verify_failure", "failure_reason"}


def well_formed(answer: str) -> str:
    return f"<think>some thought</think>\n<answer>{answer}</answer>"


def score(text: str, truth, timeout_s: float = 20.0) -> dict:
    result = asyncio.run(compute_score("any", text, truth, timeout_s=timeout_s))
    assert set(result) == KEYS
    return result


def test_the_four_scores():
    assert score(well_formed("42"), "42")["score"] == 1.5
    assert score("The answer is <answer>42</answer>", "42")["score"] == 0.5
    assert score(well_formed("41"), "42")["score"] == -0.5
    assert score("The answer is 42", "42")["score"] == -1.5


def test_the_first_row_that_cannot_be_judged():
    assert unjudgeable(["4", 5, ["6", 7.0]]) is None and unjudgeable([]) is None
    assert unjudgeable(["4", None]) == "row 1 is null"
    assert unjudgeable(["4", {}, None, ""]) == "row 1 is a dict, and 2 more can't be judged"
    assert unjudgeable([""]) == "row 0 has 0 characters, not 1 to 1000"


def test_result_of_a_right_and_of_a_wrong_answer():
    assert score(well_formed(" 42\n"), 42) == {
        "score": 1.5, "acc": 1.0, "format": 1.0, "pred": "42", "verify_failure": 0.0, "failure_reason": "",
    }  # fmt: skip
    assert score("<answer>41</answer>", 42) == {
        "score": -1.5, "acc": 0.0, "format": 0.0, "pred": "41", "verify_failure": 0.0, "failure_reason": "",
    }  # fmt: skip


def test_the_ground_truth_may_be_a_number():
    assert [score(well_formed(a), t)["acc"] for a, t in (("18 dollars.", 18), ("0.5", 0.5), ("41", 42))] == [1, 1, 0]


@pytest.mark.parametrize(
    ("verdict", "acc", "failure", "reason"),
    [
        ("right", 1.0, 0.0, ""),
        ("wrong", 0.0, 0.0, ""),
        ("unparsable", 0.0, 0.0, "unparsable"),
        ("timeout", 0.0, 1.0, "timeout"),
        ("error: MemoryError", 0.0, 1.0, "error: MemoryError"),
    ],
)
def test_every_verdict(monkeypatch, caplog, verdict, acc, failure, reason):
    asked = []

    async def given(*arguments):
        asked.append(arguments)
        return verdict

    monkeypatch.setattr(reward, "verdict", given)
    result = score(well_formed(" x "), 5, timeout_s=3.0)
    assert asked == [("x", "5", 3.0)]
    assert (result["acc"], result["score"]) == (acc, 1.5 if acc else -0.5)
    assert (result["verify_failure"], result["failure_reason"]) == (failure, reason)
    assert ("no verdict on answer 'x'" in caplog.text) == bool(failure)  # no failure is silent


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        *((1e16, "10000000000000000"), (2.5e-05, "0.000025"), (1e21, "1" + "0" * 21), (1e16, "1e16"), (18.0, "18")),
        *(
            (-0.5, "-0.5"),
            (0.1, "0.1"),
            (np.float32(0.1), "0.1"),
            (np.float64(1e21), "1" + "0" * 21),
            (np.int64(7), "7"),
        ),
        *((np.float32(1e10), "10000000000"), (Decimal("1E+3"), "1000"), (5e-324, "5e-324"), (0.0, "0"), (100.0, "100")),
        *(("18.0", "18"), (np.str_("18"), "18")),
    ],
)
def test_numbers_as_ground_truth_are_written_out(truth, answer):
    assert score(well_formed(answer), truth)["acc"] == 1.0
    assert "e" not in references(truth)[0].casefold()
    assert score(well_formed("3"), truth)["acc"] == 0.0


def test_a_number_is_written_without_zeros_at_its_end():
    assert references([2.50, 100.0, 0.0, -0.5, 1e21]) == ["2.5", "100", "0", "-0.5", "1" + "0" * 21]


@pytest.mark.parametrize("truth", [["4", "5 cm"], ("4", 5), [4.0, 5.0], np.array([4, 5]), np.array(["4", "5"], object)])
def test_any_of_a_list_is_right(truth):
    assert [score(well_formed(answer), truth)["acc"] for answer in ("4", "5", "45", "4, 5")] == [1, 1, 0, 0]


def test_the_verdict_on_several_references(monkeypatch):
    async def given(answer, gold, timeout_s):
        return gold

    monkeypatch.setattr(reward, "verdict", given)

    def reason(*golds):
        result = score(well_formed("x^2"), list(golds))
        return "right" if result["acc"] else result["failure_reason"]

    assert reason("wrong", "right") == reason("error: X", "right") == "right"
    assert reason("timeout", "right") == "timeout"  # a hostile answer is tried once
    assert reason("timeout", "x^2") == "right"  # what needs no worker comes first
    assert reason("wrong", "error: X", "unparsable") == "error: X"
    assert reason("unparsable", "wrong") == "" and reason("unparsable", "unparsable") == "unparsable"


@pytest.mark.parametrize(
    "truth",
    [
        "",
        None,
        "1" * 1001,
        " ",
        [],
        ["4", None],
        ["4", ""],
        [["4"]],
        {"answer": "4"},
        math.nan,
        "nan",
        True,
        np.array([]),
        b"4",
    ],
)
def test_a_bad_ground_truth_is_a_counted_failure(truth):
    result = score(well_formed("x^2"), truth)
    assert (result["score"], result["verify_failure"]) == (-0.5, 1.0)
    assert result["failure_reason"].startswith("error: ground truth")
    assert score(well_formed("4"), truth)["verify_failure"] == 1.0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no_answer"),
        (" \n", "no_answer"),
        ("5</answer><answer>5", "several_answers"),
        ("{" * 10_000 + "}" * 10_000, "too_long"),
        ("1" * 1001, "too_long"),
    ],
)
def test_answers_that_are_no_answers(answer, reason):
    result = score(well_formed(answer), "5")
    assert (result["acc"], result["verify_failure"], result["failure_reason"]) == (0.0, 0.0, reason)
    assert result["pred"] == ("" if reason != "too_long" else answer[:1000])


def test_the_longest_answer_that_is_read():
    assert score(well_formed("1" * 1000), "1" * 1000)["acc"] == 1.0


def test_a_text_without_answer():
    assert score("", "5")["failure_reason"] == "no_answer"
    assert score("5", "5")["failure_reason"] == "no_answer"


def boxed(text: str, truth) -> dict:
    return asyncio.run(reward.compute_score("d", text, truth, format="boxed"))


def test_a_reasoning_model_as_it_is():
    right = boxed("so 2 + 2 = 4\n</think>\n\nThe answer is \\boxed{4}.", "4")
    assert (right["score"], right["acc"], right["format"], right["pred"]) == (1.5, 1.0, 1.0, "4")
    assert boxed("a</think> \\boxed{\\frac{1}{2}}", "0.5")["score"] == 1.5
    assert boxed("a</think> \\boxed{4} no, \\boxed{5}", "5")["score"] == 0.5  # right, not well formed
    assert boxed("a</think> \\boxed{5}", "4")["score"] == -0.5
    for text in ("a \\boxed{4}", "a</think> \\boxed{4", "a</think> 4", "<think>a</think>\n<answer>4</answer>"):
        assert (boxed(text, "4")["score"], boxed(text, "4")["failure_reason"]) == (-1.5, "no_answer"), text
    with pytest.raises(ValueError, match=r"^format: 'xml' must be one of tags, boxed, boxed_no_think.$"):
        asyncio.run(reward.compute_score("d", "", "4", format="xml"))


def test_timeout_must_be_positive():
    with pytest.raises(ValueError, match=r"^timeout_s: 0 must be positive; give seconds, such as 5\.0\.$"):
        score(well_formed("1/2"), "0.5", timeout_s=0)
    assert score(well_formed("5"), "5", timeout_s=0.5)["acc"] == 1.0
    with pytest.raises(ValueError, match=r"^timeout_s: inf must be"):
        score(well_formed("1/2"), "0.5", timeout_s=math.inf)


def test_what_others_import_from_here_is_here():
    assert all(callable(getattr(reward, name)) for name in reward.__all__ if not name.isupper())
    assert reward.MAX_ANSWER_CHARS == 1000 and len(reward.MARKERS) == 4
