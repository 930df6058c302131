"""The embedded task: hand-written traces, right answers, and the known minimal length."""

import random

import pytest

from iapo.tasks import verbose_arithmetic as task

NUMBERS = (12, 34, 5, 78)
MINIMAL = "<think>12+34=46;46+5=51;51+78=129;</think>\n<answer>129</answer>"


def test_prompt_and_answer_by_hand():
    assert task.prompt(NUMBERS) == "12+34+5+78="
    assert task.answer(NUMBERS) == "129"
    assert task.parse_prompt("12+34+5+78=") == NUMBERS


def test_additions_and_minimal_trace_by_hand():
    assert task.additions(NUMBERS) == ["12+34=46;", "46+5=51;", "51+78=129;"]
    assert task.minimal_trace(NUMBERS) == MINIMAL
    # 9 + 8 + 10 characters of steps, 3 of the answer, 4 markers, newline, EOS
    assert task.minimal_tokens(NUMBERS) == 36


def test_problems_are_four_numbers_up_to_99_and_follow_the_seed():
    problems = [task.sample_problem(random.Random(seed)) for seed in range(2000)]
    assert all(len(p) == 4 for p in problems)
    drawn = {x for p in problems for x in p}
    assert drawn == set(range(1, 100))
    assert problems[:5] == [task.sample_problem(random.Random(seed)) for seed in range(5)]


def test_every_trace_ends_in_the_right_answer_and_contains_every_step_in_order():
    rng = random.Random(0)
    for _ in range(500):
        numbers = task.sample_problem(rng)
        text = task.trace(numbers, rng)
        assert task.extract_answer(text) == str(sum(numbers))
        position = 0
        for addition in task.additions(numbers):
            position = text.index(addition, position) + len(addition)


def test_certain_redundancy_follows_every_step():
    rng = random.Random(1)
    repeats = fillers = 0
    for _ in range(200):
        reasoning = task.trace(NUMBERS, rng, redundancy=1.0).split("</think>")[0].removeprefix("<think>")
        for addition in task.additions(NUMBERS):
            reasoning = reasoning.removeprefix(addition)
            if reasoning.startswith(" wait again:"):
                reasoning = reasoning.removeprefix(f" wait again:{addition}")
                repeats += 1
            else:
                words, _, reasoning = reasoning.partition(";")
                assert 4 <= len(words.split()) <= 10
                assert {f" {word}" for word in words.split()} <= set(task.FILLER_WORDS)
                fillers += 1
        assert reasoning == ""
    assert repeats + fillers == 600
    assert 240 < repeats < 360


def test_redundancy_half_follows_half_of_the_steps():
    rng = random.Random(2)
    texts = [task.trace(NUMBERS, rng) for _ in range(600)]
    redundant = sum(t.count(" wait again:") for t in texts)
    redundant += sum(part.startswith(task.FILLER_WORDS) for t in texts for part in t.split(";"))
    assert 0.46 < redundant / (3 * 600) < 0.54
    assert 0.09 < texts.count(MINIMAL) / 600 < 0.16  # 1/8 expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "129",
        MINIMAL + "\n",
        " " + MINIMAL,
        MINIMAL.replace("\n", ""),
        MINIMAL.replace("129</answer>", "</answer>"),
        MINIMAL.replace("129</answer>", "129;</answer>"),
        MINIMAL.replace("46;46", "46;<think>46"),
        MINIMAL + MINIMAL,
        MINIMAL.removesuffix("</answer>"),
    ],
)
def test_a_completion_of_another_form_has_no_answer(text):
    assert task.extract_answer(text) is None


def test_a_wrong_sum_is_still_an_answer():
    assert task.extract_answer(MINIMAL.replace("129</answer>", "7</answer>")) == "7"


@pytest.mark.parametrize("text", ["", "12", "12+34", "12+34=46", "12++3=", "a+b="])
def test_parse_prompt_names_what_it_got(text):
    with pytest.raises(ValueError, match=r"^prompt: .* must be a sum such as"):
        task.parse_prompt(text)
