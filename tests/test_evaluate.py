"""Pass@k against all subsets, figures by hand, intervals, and what dumps must hold."""

import itertools
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iapo.data import prepare
from iapo.tasks import verbose_arithmetic, worked_sums
from iapo.tools.evaluate import (
    Sample,
    bootstrap,
    evaluate,
    known_minimum,
    main,
    of_prompts,
    pass_at_k,
    read_prompts,
    read_samples,
)

# 12+34+5+78= takes at least 36 tokens (tests/test_verbose_arithmetic.py), 1+1+1+1= at least 25.
LONG, SHORT = "12+34+5+78=", "1+1+1+1="


def samples_of(prompt, *entries):
    return [Sample(prompt, bool(correct), float(tokens), bool(cut)) for correct, tokens, cut in entries]


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # C(3,2)/C(4,2) = 3/6 of the pairs have no right one
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 0, 4) == 0
    assert pass_at_k(4, 1, 4) == 1


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(st.integers(1, 200), st.data())
def test_pass_at_k_grows_with_k_and_with_right_samples(n, data):
    c, k = data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n))
    value = pass_at_k(n, c, k)
    assert 0 <= value <= pass_at_k(n, c + 1, k) <= 1
    assert k == n or value <= pass_at_k(n, c, k + 1)
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)


@pytest.mark.parametrize("n,c,k", [(4, 1, 5), (4, 1, 0), (0, 0, 1), (4, 5, 1), (4, -1, 1)])
def test_impossible_numbers_are_refused(n, c, k):
    with pytest.raises(ValueError, match="must be from"):
        pass_at_k(n, c, k)


def test_figures_by_hand():
    samples = samples_of(LONG, (1, 36, 0), (0, 60, 1)) + samples_of(SHORT, (1, 26, 0), (1, 30, 0))
    figures = evaluate(samples, [2])
    assert list(figures) == ["pass@1", "pass@2", "tokens", "ratio@1", "ratio@2", "truncated", "tokens/minimum"]
    assert figures["pass@1"] == 0.75 and figures["pass@2"] == 1
    assert figures["tokens"] == (48 + 28) / 2
    assert figures["ratio@1"] == 0.75 / 38 and figures["ratio@2"] == 1 / 38
    assert figures["truncated"] == 0.25
    assert figures["tokens/minimum"] == 38 / 30.5


def test_each_problem_counts_the_same():
    samples = samples_of(LONG, (1, 40, 0)) + samples_of(SHORT, *[(0, 20, 1)] * 9)
    figures = evaluate(samples)
    assert figures["pass@1"] == 0.5 and figures["tokens"] == 30 and figures["truncated"] == 0.5


def test_order_does_not_matter():
    samples = [s for i in range(8) for s in samples_of(f"{i}+1=", *[(i % 2, 10 * i + j, j == 2) for j in range(3)])]
    shuffled = random.Random(0).sample(samples, len(samples))
    assert evaluate(shuffled, [1, 3]) == evaluate(samples, [1, 3])
    assert bootstrap(shuffled, [1, 3], 20) == bootstrap(samples, [1, 3], 20)


def test_minimum_is_known_for_embedded_tasks_only():
    assert known_minimum(LONG) == verbose_arithmetic.minimal_tokens((12, 34, 5, 78)) == 36
    assert known_minimum(SHORT) == 25
    assert known_minimum("387+456+219=") == worked_sums.minimal_tokens((387, 456, 219)) == 35
    # the plan `c;` is 2 tokens, `c=08+a17:18=c25;` 11; the answer, 4 markers, newline, EOS
    assert known_minimum("a=17;c=08+a;c?") == 20
    assert math.isnan(known_minimum("How many clips did she sell?"))
    assert "tokens/minimum" not in evaluate(samples_of(LONG, (1, 36, 0)) + samples_of("Why?", (1, 9, 0)))


def test_responses_without_a_token_have_no_ratio():
    assert math.isnan(evaluate(samples_of("Why?", (1, 0, 0)))["ratio@1"])


def test_intervals_hold_the_estimate_shrink_with_problems_and_follow_the_seed():
    def draw(problems):
        rng = random.Random(0)
        return [s for i in range(problems) for s in samples_of(f"p{i}", (rng.random() < 0.7, rng.randint(20, 60), 0))]

    few, many = draw(30), draw(480)
    widths = []
    for samples in (few, many):
        estimate, intervals = evaluate(samples), bootstrap(samples, seed=1)
        for name, (low, high) in intervals.items():
            assert low <= estimate[name] <= high, name
        widths.append(intervals["pass@1"][1] - intervals["pass@1"][0])
    assert 3 < widths[0] / widths[1] < 5.5  # the square root of 16
    # A mean of 480 coins: 1.96 standard errors each way.
    p = evaluate(many)["pass@1"]
    assert widths[1] == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 480), rel=0.15)
    assert bootstrap(few, seed=1) == bootstrap(few, seed=1) != bootstrap(few, seed=2)


def test_problems_are_resampled_whole():
    """A problem's samples agree with each other here, so 100 of them say no more than one."""
    one = [s for i in range(20) for s in samples_of(f"p{i}", (i % 2, 10, 0))]
    hundred = [s for i in range(20) for s in samples_of(f"p{i}", *[(i % 2, 10, 0)] * 100)]
    assert bootstrap(one) == bootstrap(hundred)


@pytest.mark.parametrize("options", [{"level": 1.0}, {"level": 0.0}, {"resamples": 0}])
def test_impossible_intervals_are_refused(options):
    with pytest.raises(ValueError, match="must be "):
        bootstrap(samples_of(LONG, (1, 36, 0)), **options)


def record(prompt=LONG, acc=1.0, tokens=40.0, truncated=0.0, **more):
    return {"input": prompt, "output": "", "acc": acc, "response_length": tokens, "truncated": truncated} | more


def write_dump(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_command_reads_the_last_validation(tmp_path, capsys):
    write_dump(tmp_path / "validation/9.jsonl", record(acc=0.0))
    write_dump(tmp_path / "validation/10.jsonl", record(tokens=36.0), record(acc=0.0, tokens=54.0, truncated=1.0))
    assert main([str(tmp_path), "--k", "1", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("10.jsonl") and lines[1].startswith("1 problems, 2 completions")
    printed = {line[:24].strip(): line[24:].split()[0] for line in lines[2:] if line}
    assert printed == {
        "pass@1": "0.5000",
        "pass@2": "1.0000",
        "mean response tokens": "45.0",
        "ratio@1": "0.0111",
        "ratio@2": "0.0222",
        "truncation rate": "0.5000",
        "tokens / known minimum": "1.2500",
    }
    assert main(["--step", "9", str(tmp_path)]) == 0
    assert "pass@1                     0.0000" in capsys.readouterr().out


def test_splits_are_told_apart_by_their_prompts(tmp_path, capsys):
    paths = prepare("verbose_arithmetic", tmp_path, train_size=5, test_size=3)
    test, train = read_prompts(paths["test"]), read_prompts(paths["train"])
    assert len(test) == 3 and len(train) == 5
    dump = write_dump(tmp_path / "0.jsonl", *[record(p, acc=1.0) for p in test], *[record(p, acc=0.0) for p in train])
    assert {s.prompt for s in of_prompts(read_samples(dump), test)} == test
    capsys.readouterr()
    assert main([str(dump), "--prompts", str(paths["test"])]) == 0
    assert "pass@1                     1.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "holds no completion"),
        ("{\n", "line 1: not JSON"),
        ("[]\n", "line 1: has no text 'input'"),
        (json.dumps({"input": LONG, "acc": 1.0, "truncated": 0.0}), "response_length is None, not a number from 0"),
        (json.dumps(record(acc="yes")), "acc is 'yes', not a number from 0 to 1"),
        (json.dumps(record()) + "\n" + json.dumps(record(tokens=float("nan"))), "line 2: response_length is nan"),
        (json.dumps(record(tokens=float("inf"))), "response_length is inf"),
        (json.dumps(record(truncated=-1)), "truncated is -1"),
        *(
            (
                json.dumps(record(acc=0.0, verify_failure=1.0, gts=truth)),
                f"line 1: gts, the ground truth, {problem}, so no",
            )
            for truth, problem in ((None, "is null"), ({"a": 1}, "is a dict"), ([], "is an empty list"))
        ),
    ],
)
def test_bad_dumps_give_one_line(tmp_path, capsys, text, message):
    (tmp_path / "0.jsonl").write_text(text)
    assert main([str(tmp_path / "0.jsonl")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("iapo.evaluate: ") and message in line


def test_ground_truths_of_a_dump_that_are_fine(tmp_path):
    dump = write_dump(
        tmp_path / "0.jsonl",
        record(verify_failure=0.0, gts=["4", 5]),
        record(acc=0.0, verify_failure=1.0, gts="x"),  # a time-out
        record(gts={"mine": 1}),  # another reward's
    )
    assert [sample.correct for sample in read_samples(dump)] == [True, False, True]


def test_other_bad_input_gives_one_line(tmp_path, capsys):
    dump = str(write_dump(tmp_path / "0.jsonl", record()))
    (tmp_path / "no.parquet").write_text("no")
    other = prepare("verbose_arithmetic", tmp_path, train_size=1, test_size=1)["test"]
    capsys.readouterr()
    for arguments, message in (
        ([str(tmp_path)], "holds no validation/<step>.jsonl"),
        ([str(tmp_path / "gone.jsonl")], "can't be read"),
        ([str(tmp_path), "--step", "7"], "7.jsonl: can't be read"),
        ([dump, "--k", "2"], "k: 2 must be from 1 to the 1 samples"),
        ([dump, "--prompts", str(tmp_path / "no.parquet")], "is no parquet file with a column 'prompt'"),
        ([dump, "--prompts", str(tmp_path / "gone.parquet")], "no parquet file with a column 'prompt'"),
        ([dump, "--prompts", str(other)], f"--prompts: {other} holds no prompt that"),
        ([dump, "--resamples", "0"], "resamples: 0 must be at least 1"),
        ([dump, "--seed", "-1"], "seed: -1 must be at least 0"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("iapo.evaluate: ") and message in line, line


def test_a_completion_may_hold_separators_that_are_no_line_breaks(tmp_path):
    line = json.dumps(record(output="a\u2028b\x85c\x0cd"), ensure_ascii=False)  # as verl writes it
    (tmp_path / "0.jsonl").write_text(f"{line}\n{line}\n")
    assert len(line.splitlines()) > 1
    assert len(read_samples(tmp_path / "0.jsonl")) == 2
    (tmp_path / "0.jsonl").write_text("")
    assert read_samples(tmp_path / "0.jsonl") == []
