"""The one owner of the answer's format: what is well formed, how an answer is read, and that the parts agree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iapo.answer_format import FORMATS, MARKERS, PROBE, boxes, extract_answer, final_answer, format_ok, written
from iapo.config import IapoConfig


def test_the_parts_by_hand():
    assert MARKERS == ("<think>", "</think>", "<answer>", "</answer>")
    assert PROBE == "</think>\n<answer>"
    assert written("1+1=2;", "2") == "<think>1+1=2;</think>\n<answer>2</answer>"


def test_what_is_written_and_asked_for_is_what_is_rewarded():
    config = IapoConfig()
    assert format_ok(written("a", "b")) and extract_answer(written("a", "b")) == "b"
    assert final_answer(written("a", "b")) == final_answer(written("a", "b"), config.probe, config.answer_end) == "b"
    assert (config.exit_marker, config.probe, config.answer_end) == (MARKERS[1], PROBE, MARKERS[3])


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think>\n<answer>b</answer>",
        " \n<think>a\n\nb</think>\n<answer>\nc\n</answer>\n \t",
        "<think></think>\n<answer></answer>",
    ],
)
def test_format_ok(text):
    assert format_ok(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<answer>b</answer>",
        "a</think>\n<answer>b</answer>",
        "Sure. <think>a</think>\n<answer>b</answer>",
        "<think>a</think>\n<answer>b</answer> Done.",
        "<think>a</think><answer>b</answer>",
        "<think>a</think>\n\n<answer>b</answer>",
        "<think>a</think> and <answer>b</answer>",
        "<think>a<think>b</think>\n<answer>c</answer>",
        "<think>use <answer></think>\n<answer>c</answer>",
        "<think>a</think>\n<answer>b</answer>\n<answer>c</answer>",
        "<answer>b</answer>\n<think>a</think>",
        "<think>a</think>\n<answer>b",
    ],
)
def test_format_not_ok(text):
    assert not format_ok(text)


def test_extract_answer():
    assert extract_answer("x <answer> 5 </answer> y") == "5"
    assert extract_answer("<answer></answer>") == ""
    assert extract_answer("write <answer> first. <answer>5</answer>") == "5"
    assert extract_answer("<answer>5</answer><answer>5</answer>") is None
    assert extract_answer("</answer><answer>5") is None
    assert extract_answer("") is None


def test_final_answer_by_hand():
    probe, end = "</think>\n<answer>", "</answer>"
    assert final_answer("<think>a</think>\n<answer>12</answer>", probe, end) == "12"
    assert final_answer("</think>\n<answer>1</answer></think>\n<answer>2</answer>", probe, end) == "2"
    assert final_answer("</think>\n<answer>1</answer> 2</answer>", probe, end) == "1"
    assert final_answer("<think>a</think>\n<answer>12", probe, end) == ""
    assert final_answer("<answer>12</answer>", probe, end) == ""


# A completion of a reasoning model, what it answers, and whether it is laid out as asked.
BOXED = [
    (r"<think>2+2</think>\n\nThe answer is \boxed{4}.", "4", True),
    (r"2+2\n</think>\n\n\boxed{4}", "4", True),  # the template opened the reasoning
    (r"<think>a</think> \boxed{\frac{1}{2}} and that is all", r"\frac{1}{2}", True),
    (r"<think>a</think> \boxed{\{1, 2\}}", r"\{1, 2\}", True),
    (r"<think>a</think> \boxed{\boxed{4}}", r"\boxed{4}", True),
    (r"<think>a</think> \boxed{4} So \boxed{ 4 }.", " 4 ", True),  # said twice
    (r"<think>a</think> \boxed{4} No, \boxed{5}.", "5", False),  # several
    (r"<think>a</think> \boxed{4} or \boxed{5", None, False),  # never closed
    (r"<think>a</think> \boxed{4", None, False),
    (r"<think>a \boxed{4}</think> It is 4.", None, False),  # in the reasoning only
    (r"<think>a \boxed{4}", None, False),
    (r"\boxed{4}", None, False),  # no reasoning
    (r"<think>a \boxed{3}</think> \boxed{4}", "4", True),
    (r"<think>a</think> b </think> \boxed{4}", "4", False),
    (r"<think>a</think> <think>b \boxed{4}", "4", False),
    (r"Well. <think>a</think> \boxed{4}", "4", False),
    (r"<think>a</think> \boxed{}", "", True),  # an empty answer is wrong, not ill-formed
    ("<think>a</think>\n<answer>4</answer>", None, False),  # the other format
    ("", None, False),
]


@pytest.mark.parametrize("text,answer,well_formed", BOXED)
def test_boxed_by_hand(text, answer, well_formed):
    text, boxed = text.replace(r"\n\n", "\n\n"), FORMATS["boxed"]
    assert boxed.answers(text) == ([] if answer is None else [answer])
    assert boxed.well_formed(text) is well_formed
    assert boxed.final_answer(text, boxed.probe, boxed.answer_end) == (answer or "")


def test_boxed_without_think():
    plain = FORMATS["boxed_no_think"]
    assert plain.answers(r"2+2 is \boxed{4}.") == ["4"] and plain.well_formed(r"2+2 is \boxed{4}.")
    assert plain.answers(r"\boxed{4} \boxed{5}") == ["5"] and not plain.well_formed(r"\boxed{4} \boxed{5}")
    assert plain.answers("4") == [] and not plain.well_formed("4")
    assert not plain.well_formed(r"<think>a</think> \boxed{4}")


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_asks_for_is_what_it_pays_for(name):
    given = FORMATS[name]
    opening = "<think>" if "<think>" in given.markers else ""
    text = f"{opening}a{given.probe}b{given.answer_end}"
    assert given.well_formed(text) and given.answers(text) == ["b"]
    assert given.final_answer(text, given.probe, given.answer_end) == "b"
    assert given.probe.lstrip().startswith(given.exit_marker)
    assert not any(other.well_formed(text) for other in FORMATS.values() if other is not given)
    config = IapoConfig(format=name, exit_marker=given.exit_marker, probe=given.probe, answer_end=given.answer_end)
    assert config.format == name
    with pytest.raises(ValueError, match=r"^iapo.format: 'xml' must be one of tags, boxed, boxed_no_think.$"):
        IapoConfig(format="xml")


@given(st.text(alphabet=r"ab\{}", max_size=12))
def test_a_box_holds_balanced_text_and_nothing_more(text):
    """Against a count of braces from the left, one character at a time."""
    depth, end, skip = 1, None, False
    for i, character in enumerate(text):
        if skip:
            skip = False
        elif character == "\\":
            skip = True
        else:
            depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            end = i
            break
    assert boxes(r"\boxed{" + text)[0] == (None if end is None else text[:end])
