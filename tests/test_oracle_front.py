"""The front of the embedded tasks: hand numbers, and every policy there is, tried out."""

import itertools
import json
import math
import random
from statistics import fmean

import pytest

from benchmarks.front import Point, at_price, checked_registers, front, hull, regret, worked_sums
from benchmarks.front.__main__ import main
from benchmarks.front.checked_registers import EASY, Form
from benchmarks.front.oracles import ORACLES
from iapo.tasks import checked_registers as registers
from iapo.tasks import worked_sums as sums
from iapo.tasks.checked_registers import Step
from iapo.tasks.worked_sums import Sum

RIGHT_SUMS = {(carries, False): rate for carries, rate in enumerate((1.0, 0.95, 0.9, 0.8))}
RIGHT_SUMS |= {(carries, True): 0.99 for carries in range(4)}

UNKNOWN_FAST, UNKNOWN_CHECKED = Form(True, True, False), Form(True, True, True)
KNOWN_FAST, KNOWN_CHECKED = Form(True, False, False), Form(True, False, True)
RIGHT_STEPS = {EASY: 0.99, UNKNOWN_FAST: 0.1, UNKNOWN_CHECKED: 0.95, KNOWN_FAST: 0.98, KNOWN_CHECKED: 0.96}
REGISTERS = registers.parse_prompt("a=17;b=42;c=42*a;d=08+c;e=35*d;f=20*a;e?")


# --- worked sums ---


def test_rates_of_sums_by_hand():
    kept = [
        sums.Kept((Sum(2, True, True), Sum(2, True, False)), 3),
        sums.Kept((Sum(0, False, True), Sum(2, False, False)), 0),
    ]
    assert worked_sums.right_rates(kept) == {(2, True): 0.5, (0, False): 1.0, (2, False): 0.0}
    assert worked_sums.right_rates([]) == {}


def test_the_ways_of_a_sum_by_hand():
    """120+235 carries nowhere and its work ":553" is 4 tokens; 355+485 carries twice, ":0c4c8" is 6."""
    numbers = (120, 235, 485)
    fewest = sums.minimal_tokens(numbers)
    assert worked_sums.ways(numbers, RIGHT_SUMS) == [
        pytest.approx(point)
        for point in (
            (fewest, 1.0 * 0.9),
            (fewest + 6, 1.0 * 0.99),
            (fewest + 4, 0.99 * 0.9),
            (fewest + 4 + 6, 0.99 * 0.99),
        )
    ]


def test_the_tokens_of_a_way_of_a_sum_are_those_of_its_trace():
    rng = random.Random(0)
    for _ in range(200):
        numbers = sums.sample_problem(rng)
        worked = sums.trace(numbers, rng, worked=1, filler=0)
        longer = len(worked) - len(sums.minimal_trace(numbers))  # of characters that are one token each
        assert worked_sums.ways(numbers, RIGHT_SUMS)[-1].tokens == sums.minimal_tokens(numbers) + longer


def test_a_rate_of_sums_that_was_not_measured_is_named():
    with pytest.raises(ValueError, match=r"^rates: no addition with 2 carries is worked; sample more"):
        worked_sums.ways((387, 456, 219), {(2, False): 0.9})


# --- checked registers ---


def test_rates_of_steps_by_hand():
    """The fast value before a check counts as a fast product. A step that nobody needs doesn't count."""
    easy = Step(needed=True, product=False, unknown=False, checked=False, fast=True, right=True)
    unknown = easy._replace(product=True, unknown=True)
    kept = [
        registers.Kept((easy, easy._replace(fast=False, right=False)), 2),
        registers.Kept((easy._replace(fast=False, right=False, needed=False), unknown._replace(needed=False)), 2),
        registers.Kept((unknown._replace(fast=False, right=False), unknown._replace(checked=True, fast=False)), 2),
        registers.Kept((unknown,), 2),
    ]
    assert checked_registers.right_rates(kept) == {
        EASY: 0.5,
        UNKNOWN_FAST: pytest.approx(1 / 3),
        UNKNOWN_CHECKED: 1.0,
    }
    assert checked_registers.right_rates([]) == {}


def test_the_ways_of_registers_by_hand(monkeypatch):
    """42*17 is known, d is easy, 35*33 is unknown; nobody needs f. A check is 9 tokens: `?49+29:16=c25`."""
    monkeypatch.setattr(registers, "unknown", lambda a, b: (a, b) == (35, 33))
    fewest = registers.minimal_tokens(REGISTERS)
    assert checked_registers.ways(REGISTERS, RIGHT_STEPS) == [
        pytest.approx(point)
        for point in (
            (fewest, 0.98 * 0.99 * 0.1),
            (fewest + 9, 0.98 * 0.99 * 0.95),
            (fewest + 9, 0.96 * 0.99 * 0.1),
            (fewest + 18, 0.96 * 0.99 * 0.95),
        )
    ]


def test_the_tokens_of_a_way_of_registers_are_those_of_its_trace():
    rng = random.Random(0)
    for _ in range(200):
        problem = registers.sample_problem(rng)
        checked = registers.trace(problem, rng, checked=1, unneeded=0)
        assert checked_registers.ways(problem, RIGHT_STEPS)[-1].tokens == registers.token_count(checked) + 1


def test_a_rate_of_steps_that_was_not_measured_is_named():
    with pytest.raises(ValueError, match=r"^rates: no step is (un)?known, checked; sample more"):
        checked_registers.ways(REGISTERS, {KNOWN_FAST: 0.9, UNKNOWN_FAST: 0.1, EASY: 1.0})


# --- the front ---


def test_a_hull_by_hand():
    points = [(10, 0.5), (12, 0.6), (14, 0.9), (14, 0.8), (16, 0.9), (20, 1.0), (11, 0.4)]
    # 12 lies below the line from 10 to 14, 16 gains nothing
    assert hull([Point(*point) for point in points]) == [(10, 0.5), (14, 0.9), (20, 1.0)]
    assert hull([Point(3, 0.2)]) == [(3, 0.2)]


def test_the_front_of_two_problems_by_hand():
    problems = [[Point(10, 0.8), Point(16, 0.98)], [Point(20, 0.5), Point(24, 0.9)]]
    # slopes .03 and .1: the second problem's step comes first
    assert front(problems) == [pytest.approx(point) for point in ((15, 0.65), (17, 0.85), (20, 0.94))]


def test_the_front_is_the_best_of_all_policies_at_every_price():
    rng = random.Random(1)
    problems = [[Point(rng.randint(20, 40), rng.random()) for _ in range(4)] for _ in range(5)]
    best = front(problems)
    policies = [
        Point(fmean(point.tokens for point in chosen), fmean(point.accuracy for point in chosen))
        for chosen in itertools.product(*problems)
    ]
    for price in (0, 0.001, 0.01, 0.03, 0.1, 1):
        chosen = at_price(best, price)
        most = max(accuracy - price * tokens for tokens, accuracy in policies)
        assert chosen.accuracy - price * chosen.tokens == pytest.approx(most)
    assert all(regret(best, policy) >= -1e-12 for policy in policies)
    assert all(regret(best, point) == pytest.approx(0) for point in best)


def test_regret_between_beyond_and_before_the_front():
    best = [Point(10, 0.5), Point(14, 0.9)]
    assert regret(best, Point(11, 0.55)) == pytest.approx(0.05)  # 0.6 there
    assert regret(best, Point(30, 0.85)) == pytest.approx(0.05)
    assert regret(best, Point(12, 0.8)) == pytest.approx(-0.1)
    assert math.isnan(regret(best, Point(9, 0.4)))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("worked_sums", ["filler words", "run, worked", "3 carries"]),
        ("checked_registers", ["unneeded checked", "| run   |", "unknown, fast"]),
    ],
)
def test_the_command_reads_a_run(tmp_path, capsys, name, shown):
    task, rng = ORACLES[name].task, random.Random(2)
    records = []
    for _ in range(300):
        problem = task.sample_problem(rng)
        text = task.trace(problem, rng)
        record = {"input": task.prompt(problem), "output": text, "acc": 1.0, "response_length": 65, "truncated": 0.0}
        records.append(json.dumps(record))
    dump = tmp_path / "run" / "validation" / "7.jsonl"
    dump.parent.mkdir(parents=True)
    dump.write_text("\n".join(records) + "\n")
    assert main([name, str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "1.000 |   65.0 |" in out and "price of a token" in out
    assert all(text in out for text in shown)
    dump.write_text(records[0].replace('"output"', '"outputs"') + "\n")
    assert main([name, str(tmp_path / "run")]) == 2
    assert "holds no completions with a text 'output'" in capsys.readouterr().err
    (other,) = ORACLES.keys() - {name}
    dump.write_text("\n".join(records) + "\n")
    assert main([other, str(tmp_path / "run")]) == 2
    assert "benchmarks.front: prompt: " in capsys.readouterr().err
