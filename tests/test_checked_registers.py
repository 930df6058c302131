"""Checked registers: hand-written problems and traces, what is needed and unknown, and what a completion keeps."""

import random
import re
from collections import Counter
from itertools import combinations_with_replacement, pairwise
from statistics import fmean

import pytest

from iapo.tasks import checked_registers as task
from iapo.tasks.checked_registers import Definition, Kept, Step

PROMPT = "c=42*a;a=17;e=08-c;b=42;d=a+b;f=39*e;g=f-d;h=30*c;g?"
PROBLEM = task.parse_prompt(PROMPT)
STEPS = "c=42*a17=c25;d=a17+b42:04=d06;e=08-c25:41=e36;f=39*e36=f26;g=f26-d06:26=g20;"
MINIMAL = f"<think>gfedc;{STEPS}</think>\n<answer>20</answer>"
CHECKED = MINIMAL.replace("=c25;d", "=c25?49+29:16=c25;d").replace("=f26;", "=f26?04+22:24=f26;")

# 42*17, of c, is made known; 39*36, of f, and 30*25, of h, which nobody needs, are made unknown.
EASY = Step(needed=True, product=False, unknown=False, checked=False, fast=True, right=True)
KNOWN = EASY._replace(product=True)
UNKNOWN = KNOWN._replace(unknown=True)


@pytest.fixture
def unknown_pairs(monkeypatch):
    monkeypatch.setattr(task, "unknown", lambda a, b: {a, b} in ({39, 36}, {30, 25}))


def test_prompt_answer_and_the_shortest_completion_by_hand():
    assert PROBLEM.query == "g"
    assert PROBLEM.definitions[:3] == (
        Definition("c", "42", "*", "a"),
        Definition("a", "17"),
        Definition("e", "08", "-", "c"),
    )
    assert task.prompt(PROBLEM) == PROMPT
    # 714 = 13*53 + 25, 59 - 53 = 6, 8 - 25 + 53 = 36, 39*36 = 1404 = 26*53 + 26, 30*25 = 750 = 14*53 + 8
    assert task.values(PROBLEM) == {"a": 17, "b": 42, "c": 25, "d": 6, "e": 36, "f": 26, "g": 20, "h": 8}
    assert [definition.register for definition in task.needed(PROBLEM)] == ["c", "d", "e", "f", "g"]
    assert task.answer(PROBLEM) == "20"
    assert task.minimal_trace(PROBLEM) == MINIMAL
    # the plan's 6 tokens, steps of 9, 12, 11, 9 and 12, the answer, 4 markers, newline, EOS
    assert task.minimal_tokens(PROBLEM) == 66
    assert task.answer(task.parse_prompt("a=17;b=17-a;b?")) == "00"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("12+34=", "must be definitions and a query"),
        ("a=17;b=8+a;b?", "must be definitions and a query"),
        ("a=17;b=a+08;b?", "must be definitions and a query"),
        ("a=17;b=08+a;", "must be definitions and a query"),
        ("a=17;b=08+a;c?", "must define each register once, and the one it asks for"),
        ("a=17;a=18;a?", "must define each register once"),
        ("a=01+b;b=01+a;b?", "must define no register by itself"),
        ("a=01+b;a?", "or by one that it lacks"),
    ],
)
def test_what_is_no_prompt_is_refused(text, reason):
    with pytest.raises(ValueError, match=f"^prompt: '{re.escape(text)}' .*{reason}"):
        task.parse_prompt(text)


def test_checks_by_hand():
    assert task.check(42, 17) == "?49+29:16"  # 420 = 7*53 + 49, 294 = 5*53 + 29, 69 - 53; 16+9 is the product, 25
    assert task.check(39, 36) == "?04+22:24"  # 1170 = 22*53 + 4, 234 = 4*53 + 22, 4+20; 24+2 is 26
    assert task.check(50, 3) == "?00+44:40"  # 150 = 2*53 + 44; 40+4 is 44
    assert task.check(0, 52) == "?00+00:00"


def test_a_check_comes_to_the_product():
    for a in range(53):
        for b in range(53):
            tens, units, half = map(int, re.findall(r"\d\d", task.check(a, b)))
            assert (tens + units) % 53 == a * b % 53 == (half + units % 10) % 53


def test_known_pairs_are_a_fixed_share_in_either_order_and_every_value_has_both_kinds():
    pairs = list(combinations_with_replacement(range(53), 2))
    known = [pair for pair in pairs if not task.unknown(*pair)]
    assert len(known) / len(pairs) == pytest.approx(task.KNOWN_PAIRS_SHARE, abs=0.02)
    assert not any(task.unknown(b, a) for a, b in known)
    assert known[:5] == [(0, 23), (0, 29), (0, 38), (0, 40), (0, 47)]  # trained models depend on them
    for a in range(53):
        share = fmean(task.unknown(a, b) for b in task.NUMBERS)
        assert 0.75 < share < 0.99


def test_problems_need_two_to_five_of_six_operations_and_follow_the_seed():
    problems = [task.sample_problem(random.Random(seed)) for seed in range(4000)]
    count = Counter(len(task.needed(problem)) for problem in problems)
    assert count.keys() == {2, 3, 4, 5}
    assert all(0.22 < share / len(problems) < 0.28 for share in count.values())
    assert problems[:5] == [task.sample_problem(random.Random(seed)) for seed in range(5)]
    for problem in problems:
        assert sorted(d.register for d in problem.definitions) == list("abcdefgh")
        assert sum(not d.operator for d in problem.definitions) == 2
        assert not any(problem.query in d.operands for d in problem.definitions)
        assert task.parse_prompt(task.prompt(problem)) == problem
        assert task.token_count(task.prompt(problem)) == 2 * 3 + 6 * 5 + 2
    operations = [d for problem in problems for d in problem.definitions if d.operator]
    assert fmean(d.operator == "*" for d in operations) == pytest.approx(0.4, abs=0.02)
    assert all(d.left.isdigit() for d in operations if d.operator == "*")
    assert fmean(d.left.isalpha() for d in operations if d.operator != "*") == pytest.approx(0.5, abs=0.02)
    assert all(d.left != d.right for d in operations)
    places = Counter(problem.definitions.index(task.needed(problem)[-1]) for problem in problems)
    assert all(0.1 < places[place] / len(problems) < 0.15 for place in range(8))


def test_needed_operations_are_a_chain_and_the_others_change_nothing():
    rng = random.Random(1)
    for _ in range(500):
        problem = task.sample_problem(rng)
        needed = task.needed(problem)
        assert all(a.register in b.operands for a, b in pairwise(needed))
        assert task.trace(problem, rng).startswith(f"<think>{task.plan(needed)}")
        spare = [d for d in problem.definitions if d.operator and d not in needed]
        assert len(needed) + len(spare) == 6
        left = tuple(d for d in problem.definitions if d not in spare)
        assert task.answer(problem._replace(definitions=left)) == task.answer(problem)
        assert task.needed(problem._replace(definitions=left)) == needed


def test_traces_with_certain_choices_by_hand(unknown_pairs):
    rng = random.Random(0)
    assert task.trace(PROBLEM, rng, checked=0, unneeded=0) == MINIMAL
    assert task.trace(PROBLEM, rng, checked=1, slip=0, unneeded=0) == CHECKED
    slipped = task.trace(PROBLEM, rng, checked=1, slip=1, unneeded=0)
    assert re.sub(r"=f\d\d\?", "=f26?", slipped) == CHECKED and slipped != CHECKED
    # Once c is there h can be worked out.
    spare = task.trace(PROBLEM, rng, checked=0, unneeded=1)
    assert spare == MINIMAL.replace("d=a", "h=30*c25=h08;d=a")


def test_the_pieces_of_a_trace_by_hand(unknown_pairs):
    def left_out(**options):
        """The trace with the pieces in brackets on which training has no loss."""
        pieces = task.pieces(PROBLEM, random.Random(0), unneeded=0, **options)
        return "".join(text if has_loss else f"[{text}]" for text, has_loss in pieces)

    assert left_out(checked=0) == MINIMAL.replace("f26;", "f[26];")
    assert left_out(checked=1, slip=0) == CHECKED.replace("f26?", "f[26]?")
    slipped = left_out(checked=1, slip=1)
    assert re.sub(r"f\[\d\d\]\?", "f[26]?", slipped) == CHECKED.replace("f26?", "f[26]?") and "f[26]" not in slipped


def test_lessons_begin_with_small_problems():
    for seed in range(100):
        small, pieces = task.lesson(random.Random(seed), task.SMALL - 1)
        first, second = task.needed(small)
        registers = {first.register, *first.operands, second.register, *second.operands}
        assert {d.register for d in small.definitions} == registers and small.query == second.register
        assert task.parse_prompt(task.prompt(small)) == small
        kept = task.kept(small, "".join(text for text, _ in pieces))
        assert [step.needed for step in kept.steps] == [True, True] and all(step.right for step in kept.steps)
        usual, _ = task.lesson(random.Random(seed), task.SMALL)
        assert usual == task.sample_problem(random.Random(seed))


def test_every_trace_has_the_form_the_right_answer_and_a_good_length():
    rng = random.Random(2)
    found, lengths = [], []
    for _ in range(3000):
        problem = task.sample_problem(rng)
        text = task.trace(problem, rng)
        assert task.extract_answer(text) == task.answer(problem)
        kept = task.kept(problem, text)
        assert (
            re.sub(r"[^;]*;", "", text, count=len(kept.steps) + 1)
            == f"</think>\n<answer>{task.answer(problem)}</answer>"
        )
        assert kept.due == sum(step.needed for step in kept.steps) and all(step.right for step in kept.steps)
        assert all(step.fast or (step.unknown and step.checked) for step in kept.steps)
        found.append(kept)
        lengths.append(task.token_count(text) + 1)
        assert lengths[-1] >= task.minimal_tokens(problem)
    assert fmean(lengths) < 72 and max(lengths) <= 128
    metrics = task.kept_metrics(found)
    for kind in ("unknown", "known", "unneeded"):
        assert metrics[f"checked/{kind}"] == pytest.approx(0.5, abs=0.04)
    assert metrics["needed"] == metrics["right/easy"] == metrics["right/fast/known"] == 1
    assert metrics["right/fast/unknown"] == pytest.approx(1 - 0.5 * 0.75, abs=0.04)
    assert 0.6 < metrics["unneeded"] < 1.1
    products = [step for kept in found for step in kept.steps if step.product]
    assert fmean(step.unknown for step in products) == pytest.approx(task.UNKNOWN_SHARE, abs=0.02)


def test_the_longest_completion_fits():
    """All six operations are products, and each is checked: 18 tokens a step."""
    problem = task.parse_prompt("a=17;b=42;c=02*a;d=03*c;e=04*d;f=05*e;g=06*f;h=07*a;g?")
    text = task.trace(problem, random.Random(0), checked=1, unneeded=1)
    assert task.token_count(text) + 1 == 6 + 6 * 18 + 4 + 1 + 1 + 1 <= 128


def test_what_is_kept_by_hand(unknown_pairs):
    assert task.kept(PROBLEM, MINIMAL) == Kept((KNOWN, EASY, EASY, UNKNOWN, EASY), 5)
    checked = (KNOWN._replace(checked=True), EASY, EASY, UNKNOWN._replace(checked=True), EASY)
    assert task.kept(PROBLEM, CHECKED) == Kept(checked, 5)
    corrected = CHECKED.replace("=f26?", "=f31?")
    assert task.kept(PROBLEM, corrected).steps[3] == UNKNOWN._replace(checked=True, fast=False)
    spare = MINIMAL.replace("d=a", "h=30*c25=h09;d=a")
    assert task.kept(PROBLEM, spare).steps[1] == UNKNOWN._replace(needed=False, fast=False, right=False)


def test_a_mistake_counts_once_and_is_what_later_steps_start_from():
    # c became 26, so e is 8 - 26 + 53 = 35, f is 39*35 = 1365 = 25*53 + 40 and g is 40 - 6 = 34
    steps = ("c=42*a17=c26;", "d=a17+b42:04=d06;", "e=08-c26:41=e35;", "f=39*e35=f40;", "g=f40-d06:40=g34;")
    text = "".join(steps)
    assert [step.right for step in task.kept(PROBLEM, text).steps] == [False, True, True, True, True]
    # A check that is wrong counts too, and one that corrects hides the fast value.
    checked = text.replace("c26;d", "c25?49+29:16=c26;d")
    assert [(step.fast, step.right) for step in task.kept(PROBLEM, checked).steps[:3]] == [
        (True, False),
        (True, True),
        (True, True),
    ]


def test_a_miscopied_operand_is_a_mistake():
    text = MINIMAL.replace("e=08-c25:41=e36", "e=08-c35:31=e26")
    assert [step.right for step in task.kept(PROBLEM, text).steps] == [True, True, False, False, True]


def test_an_operand_that_was_not_worked_out_has_its_true_value():
    assert task.kept(PROBLEM, "<think>f=39*e36=f26;").steps[0].right
    assert not task.kept(PROBLEM, "<think>f=39*e35=f40;").steps[0].right


@pytest.mark.parametrize(
    ("text", "needed", "others"),
    [
        ("", 0, 0),
        ("<think></think>\n<answer>20</answer>", 0, 0),
        ("<think>c=42*a17=c25;d=a17+b42:04=d0", 1, 0),  # cut
        ("<think>c=42*a17=c25?49+29:16=", 0, 0),  # cut in a check
        ("<think>c=42*a17=d25;", 0, 0),  # another register in the end
        ("<think>c=42*a17=c25;c=42*a17=c25;", 1, 1),  # repeated
        ("<think>h=30*c25=h08;a=01+b42:41=a43;", 0, 2),
    ],
)
def test_steps_that_are_left_out_cut_repeated_or_not_needed(text, needed, others):
    kept = task.kept(PROBLEM, text)
    assert [step.needed for step in kept.steps] == [True] * needed + [False] * others
    assert kept.due == 5


def test_metrics_by_hand():
    spare = KNOWN._replace(needed=False)
    found = [
        Kept((KNOWN, UNKNOWN._replace(checked=True, fast=False), EASY), 3),
        Kept((spare._replace(checked=True), EASY._replace(right=False), UNKNOWN._replace(fast=False, right=False)), 4),
        Kept((KNOWN._replace(checked=True, right=False), spare), 2),
        Kept((), 3),
    ]
    assert task.kept_metrics(found) == pytest.approx(
        {
            "needed": 6 / 12,
            "unneeded": 2 / 4,
            "checked/unknown": 1 / 2,
            "checked/known": 1 / 2,
            "checked/unneeded": 1 / 2,
            "right/easy": 1 / 2,
            "right/fast/unknown": 0.0,
            "right/fast/known": 1.0,
            "right/checked/unknown": 1.0,
            "right/checked/known": 1 / 2,
        }
    )
    assert task.kept_metrics([Kept((), 3)]) == {"needed": 0.0, "unneeded": 0.0}
    assert task.kept_metrics([]) == {}
