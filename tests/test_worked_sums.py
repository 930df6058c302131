"""Worked sums: hand-written columns and traces, right answers, the minimal length, and what a completion keeps."""

import random
import re

import pytest

from iapo.tasks import worked_sums as task
from iapo.tasks.worked_sums import Kept, Sum

NUMBERS = (387, 456, 219)
MINIMAL = "<think>387+456=843;843+219=1062;</think>\n<answer>1062</answer>"
WORKED = "<think>387+456:3c4c8=843;843+219:2c60c1=1062;</think>\n<answer>1062</answer>"


def test_prompt_answer_and_the_shortest_completion_by_hand():
    assert task.prompt(NUMBERS) == "387+456+219="
    assert task.parse_prompt("387+456+219=") == NUMBERS
    assert task.answer(NUMBERS) == "1062"
    assert task.minimal_trace(NUMBERS) == MINIMAL
    # 12 + 13 characters of steps, 4 of the answer, 4 markers, newline, EOS
    assert task.minimal_tokens(NUMBERS) == 35


@pytest.mark.parametrize(
    ("a", "b", "columns", "carries"),
    [
        (387, 456, "3c4c8", 2),
        (843, 219, "2c60c1", 2),
        (120, 235, "553", 0),
        (105, 205, "0c13", 1),
        (999, 1, "0c0c0c1", 3),
        (999, 999, "8c9c9c1", 3),
        (1998, 999, "7c9c9c2", 3),
        (1234, 111, "5431", 0),
        (900, 200, "001c1", 1),
    ],
)
def test_columns_by_hand(a, b, columns, carries):
    assert task.columns(a, b) == task.columns(b, a) == columns
    assert task.carries(a, b) == carries


def test_columns_spell_the_result_backwards_and_carries_are_what_digits_lose():
    """A carry turns ten units of a column into one of the next, so each takes 9 from the sum of digits."""
    rng = random.Random(0)

    def digits(n):
        return sum(map(int, str(n)))

    for _ in range(2000):
        a, b = rng.randint(100, 1998), rng.randint(100, 999)
        assert task.columns(a, b).replace("c", "")[::-1] == str(a + b)
        assert 9 * task.carries(a, b) == digits(a) + digits(b) - digits(a + b)


def test_problems_are_three_numbers_of_three_digits_and_follow_the_seed():
    problems = [task.sample_problem(random.Random(seed)) for seed in range(8000)]
    assert all(len(p) == 3 for p in problems)
    assert {x for p in problems for x in p} == set(range(100, 1000))
    assert problems[:5] == [task.sample_problem(random.Random(seed)) for seed in range(5)]


def test_traces_with_certain_choices_by_hand():
    rng = random.Random(0)
    assert task.trace(NUMBERS, rng, worked=0, filler=0) == MINIMAL
    assert task.trace(NUMBERS, rng, worked=1, filler=0) == WORKED
    words = "( hmm| well| okay| so| now| then| let| me| see){4,10};"
    padded = re.escape(MINIMAL).replace("843;", f"843;{words}").replace("1062;", f"1062;{words}")
    assert re.fullmatch(padded, task.trace(NUMBERS, rng, worked=0, filler=1))


def test_every_trace_has_the_form_and_the_right_answer_and_its_shares_are_those_asked_for():
    rng = random.Random(1)
    found = []
    for _ in range(2000):
        numbers = task.sample_problem(rng)
        text = task.trace(numbers, rng)
        assert task.extract_answer(text) == str(sum(numbers))
        found.append(task.kept(numbers, text))
        assert len(found[-1].sums) == 2 and all(step.right for step in found[-1].sums)
    metrics = task.kept_metrics(found)
    for kind in ("needed", "between", "unneeded"):
        assert 0.45 < metrics[f"worked/{kind}"] < 0.55
    assert 5.2 < metrics["filler"] < 6.0  # 2 additions x 0.4 x 7 words = 5.6


def test_what_is_kept_by_hand():
    # 387+456 carries twice, 843+219 twice, 120+235 never, 105+205 once
    assert task.kept(NUMBERS, MINIMAL) == Kept((Sum(2, False, True), Sum(2, False, True)), 0)
    assert task.kept(NUMBERS, WORKED) == Kept((Sum(2, True, True), Sum(2, True, True)), 0)
    mixed = "<think>120+235:553=355; hmm let me see; so so;355+105=450;</think>\n<answer>450</answer>"
    assert task.kept((120, 235, 105), mixed) == Kept((Sum(0, True, True), Sum(1, False, False)), 6)


def test_a_mistake_counts_once_and_is_what_the_next_addition_starts_from():
    # 843 became 833, and 833+219 carries twice
    text = "<think>387+456=833;833+219=1052;</think>\n<answer>1052</answer>"
    assert task.kept(NUMBERS, text).sums == (Sum(2, False, False), Sum(2, False, True))


def test_a_miscopied_operand_is_a_mistake():
    text = "<think>387+456=843;843+119=962;</think>\n<answer>962</answer>"
    assert task.kept(NUMBERS, text).sums == (Sum(2, False, True), Sum(2, False, False))


@pytest.mark.parametrize(
    ("text", "sums"),
    [
        ("", 0),
        ("<think> hmm;</think>\n<answer>1062</answer>", 0),
        ("<think>387+456=843;</think>\n<answer>1062</answer>", 1),
        ("<think>387+456=843;843+219=10", 1),  # cut
        (MINIMAL.replace("</think>", "1062+1=1063;</think>"), 2),
    ],
)
def test_sums_that_are_left_out_cut_or_too_many(text, sums):
    assert len(task.kept(NUMBERS, text).sums) == sums


def test_metrics_by_hand():
    found = [
        Kept((Sum(2, True, True), Sum(0, False, True)), 6),
        Kept((Sum(3, True, False), Sum(0, True, True)), 0),
        Kept((Sum(2, False, False),), 0),
        Kept((Sum(4, True, True),), 2),  # of a wrong result with more digits
    ]
    assert task.kept_metrics(found) == pytest.approx(
        {
            "filler": 2.0,
            "sums": 6 / 4,
            "worked/unneeded": 1 / 2,
            "right/worked/unneeded": 1.0,
            "right/direct/unneeded": 1.0,
            "worked/needed": 3 / 4,
            "right/worked/needed": 2 / 3,
            "right/direct/needed": 0.0,
        }
    )
    assert task.kept_metrics([]) == {}
