"""The front of worked sums: hand numbers, and every policy there is, tried out."""

import itertools
import json
import math
import random
from statistics import fmean

import pytest

from benchmarks import worked_sums as benchmark
from benchmarks.worked_sums import Point, front, hull, regret, right_rates, ways
from iapo.tasks import worked_sums as task
from iapo.tasks.worked_sums import Sum

RIGHT = {(carries, False): rate for carries, rate in enumerate((1.0, 0.95, 0.9, 0.8))}
RIGHT |= {(carries, True): 0.99 for carries in range(4)}


def test_rates_by_hand():
    sums = [Sum(2, True, True), Sum(2, True, False), Sum(0, False, True), Sum(2, False, False)]
    assert right_rates(sums) == {(2, True): 0.5, (0, False): 1.0, (2, False): 0.0}
    assert right_rates([]) == {}


def test_the_ways_of_a_problem_by_hand():
    """120+235 carries nowhere and its work ":553" is 4 tokens; 355+485 carries twice, ":0c4c8" is 6."""
    numbers = (120, 235, 485)
    fewest = task.minimal_tokens(numbers)
    assert ways(numbers, RIGHT) == [
        pytest.approx(point)
        for point in (
            (fewest, 1.0 * 0.9),
            (fewest + 6, 1.0 * 0.99),
            (fewest + 4, 0.99 * 0.9),
            (fewest + 4 + 6, 0.99 * 0.99),
        )
    ]


def test_the_tokens_of_a_way_are_those_of_its_trace():
    rng = random.Random(0)
    for _ in range(200):
        numbers = task.sample_problem(rng)
        worked = task.trace(numbers, rng, worked=1, filler=0)
        longer = len(worked) - len(task.minimal_trace(numbers))  # of characters that are one token each
        assert ways(numbers, RIGHT)[-1].tokens == task.minimal_tokens(numbers) + longer


def test_a_rate_that_was_not_measured_is_named():
    with pytest.raises(ValueError, match=r"^right: no addition with 2 carries is worked; sample more"):
        ways((387, 456, 219), {(2, False): 0.9})


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
        chosen = benchmark.at_price(best, price)
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


def test_the_command_reads_a_run(tmp_path, capsys):
    rng = random.Random(2)
    records = []
    for _ in range(300):
        numbers = task.sample_problem(rng)
        text = task.trace(numbers, rng)
        record = {"input": task.prompt(numbers), "output": text, "acc": 1.0, "response_length": 50, "truncated": 0.0}
        records.append(json.dumps(record))
    dump = tmp_path / "run" / "validation" / "7.jsonl"
    dump.parent.mkdir(parents=True)
    dump.write_text("\n".join(records) + "\n")
    assert benchmark.main([str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "| run | " in out and "1.000 |   50.0 |" in out
    assert "run, worked" in out and "price of a token" in out
    dump.write_text(records[0].replace('"output"', '"outputs"') + "\n")
    assert benchmark.main([str(tmp_path / "run")]) == 2
    assert "holds no completions with a text 'output'" in capsys.readouterr().err
