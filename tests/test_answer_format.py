"""The one owner of the answer's format: what is well formed, how an answer is read, and that the parts agree."""

import pytest

from iapo.answer_format import MARKERS, PROBE, extract_answer, final_answer, format_ok, written
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
