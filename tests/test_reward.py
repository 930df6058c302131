"""The reward: hand-computed scores, equivalent answers, hostile answers, and the workers behind it."""

import asyncio
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from iapo import reward
from iapo.reward import compute_score, extract_answer, format_ok, plain_number, same_number

KEYS = {"score", "acc", "format", "pred", "verify_failure", "failure_reason"}


def well_formed(answer: str) -> str:
    return f"<think>some thought</think>\n<answer>{answer}</answer>"


def score(text: str, truth, timeout_s: float = 20.0) -> dict:
    result = asyncio.run(compute_score("any", text, truth, timeout_s=timeout_s))
    assert set(result) == KEYS
    return result


def output_of(program: str) -> str:
    return subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60)


def worker_pids() -> set[int]:
    """Spawned children of this process, without Python's resource tracker, which lives as long as it does."""
    pids = set()
    for child in psutil.Process().children(recursive=True):
        # A child may end meanwhile, and other tests' processes may be zombies, which have no command line.
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                pids.add(child.pid)
    return pids


@pytest.fixture(scope="module", autouse=True)
def no_process_left_behind():
    yield
    reward.close_pool()
    assert worker_pids() == set()


@pytest.fixture
def no_workers(monkeypatch):
    """Fails the test if the cheap path asks for the pool."""
    monkeypatch.setattr(reward, "_get_pool", lambda: pytest.fail("this answer must not need a worker"))


def test_the_four_scores(no_workers):
    assert score(well_formed("42"), "42")["score"] == 1.5
    assert score("The answer is <answer>42</answer>", "42")["score"] == 0.5
    assert score(well_formed("41"), "42")["score"] == -0.5
    assert score("The answer is 42", "42")["score"] == -1.5


def test_result_of_a_right_and_of_a_wrong_answer(no_workers):
    assert score(well_formed(" 42\n"), 42) == {
        "score": 1.5, "acc": 1.0, "format": 1.0, "pred": "42", "verify_failure": 0.0, "failure_reason": "",
    }  # fmt: skip
    assert score("<answer>41</answer>", 42) == {
        "score": -1.5, "acc": 0.0, "format": 0.0, "pred": "41", "verify_failure": 0.0, "failure_reason": "",
    }  # fmt: skip


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


def test_plain_numbers():
    assert plain_number("1,234,567.50") == plain_number("1234567.5")
    for text in ("$18", "\\$18", "18 dollars", "$18.", "$18$", "18.00", "+18"):
        assert plain_number(text) == 18, text
    for text in ("", ".", "$", "1,00", "1e5", "1/2", "18%", "2 million", "2 pi", "5 or six", "x18", "9**9"):
        assert plain_number(text) is None, text
    assert plain_number("\N{ARABIC-INDIC DIGIT ONE}") is None


def test_same_number():
    assert same_number("-0.50", "-.5") is True
    assert same_number("0.3", "0.30000000000000004") is False
    assert same_number("18", "18\\%") is None
    assert same_number("9" * 1000, "9" * 999 + "8") is False


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("1,000", "1000"), ("$18", "18"), ("18 dollars.", 18), ("0.5", 0.5), ("\\text{Ann}", "\\text{Ann}")],
)
def test_right_without_a_worker(answer, truth, no_workers):
    assert score(well_formed(answer), truth)["acc"] == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("1/2", "0.5"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac12", "1/2"),
        ("$\\frac{1}{2}$", "0.5"),
        ("\\boxed{1/2}", "0.5"),
        ("5 km", "5"),
        ("18\\text{ dollars}", "18"),
        ("50\\%", "0.5"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("\\{3, 2, 1\\}", "\\{1, 2, 3\\}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("x = 5", "5"),
    ],
)
def test_equivalent_answers(answer, truth):
    result = score(well_formed(answer), truth)
    assert (result["score"], result["acc"], result["failure_reason"]) == (1.5, 1.0, "")


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("2\\sqrt{3}", "2"),
        ("2 million", "2"),
        ("5 or 6", "5"),
        ("5} or \\boxed{6", "6"),
        ("0.3333", "1/3"),
        ("(1,3)", "(1,2)"),
        ("\\frac{1}{0}", "5"),
    ],
)
def test_wrong_answers_are_no_failures(answer, truth):
    result = score(well_formed(answer), truth)
    assert (result["score"], result["verify_failure"], result["failure_reason"]) == (-0.5, 0.0, "")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no_answer"),
        (" \n", "no_answer"),
        ("5</answer><answer>5", "several_answers"),
        ("{" * 10_000 + "}" * 10_000, "too_long"),
        ("1" * 1001, "too_long"),
        ("5\0", "unparsable"),
        ("\0", "unparsable"),
        ("9**9**9**9", "unparsable"),
        ("\\frac", "unparsable"),
    ],
)
def test_answers_that_are_no_answers(answer, reason):
    result = score(well_formed(answer), "5")
    assert (result["acc"], result["verify_failure"], result["failure_reason"]) == (0.0, 0.0, reason)
    assert len(result["pred"]) <= 1000


def test_a_text_without_answer():
    assert score("", "5")["failure_reason"] == "no_answer"
    assert score("5", "5")["failure_reason"] == "no_answer"


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "9999999!", "(" * 450 + "5" + ")" * 450])
def test_a_hostile_answer_is_killed_and_the_pool_still_works(answer):
    score(well_formed("1/2"), "0.5")
    start = time.monotonic()
    result = score(well_formed(answer), "5", timeout_s=0.5)
    assert time.monotonic() - start < 0.5 + 5.0
    assert (result["score"], result["verify_failure"], result["failure_reason"]) == (-0.5, 1.0, "timeout")
    assert score(well_formed("1/2"), "0.5")["score"] == 1.5


@pytest.mark.parametrize("truth", ["", None, "\\frac", "1" * 1001])
def test_a_bad_ground_truth_is_a_counted_failure(truth):
    result = score(well_formed("x^2"), truth)
    assert (result["score"], result["verify_failure"]) == (-0.5, 1.0)
    assert result["failure_reason"].startswith("error: ground truth")


def test_concurrent_calls_are_not_hurt_by_a_hostile_one():
    """The two workers need longer for all 64 than one call's time-out: waiting must not count against it."""

    async def run():
        answers = ["9^{9^{9^{9}}}"] + [f"\\frac{{{n}}}{{2}}" for n in range(1, 64)]
        calls = [compute_score("", well_formed(a), f"{n}/2", timeout_s=3.0) for n, a in enumerate(answers)]
        return await asyncio.gather(*calls)

    hostile, *others = asyncio.run(run())
    assert (hostile["score"], hostile["failure_reason"]) == (-0.5, "timeout")
    assert [other["score"] for other in others] == [1.5] * 63


def test_waiting_for_a_worker_does_not_count():
    """Four answers run into the time-out on two workers; the fifth waits for twice its own time-out."""

    async def run():
        hostile = [compute_score("", well_formed("9^{9^{9^{9}}}"), "5", timeout_s=1.0) for _ in range(4)]
        return await asyncio.gather(*hostile, compute_score("", well_formed("1/2"), "0.5", timeout_s=1.0))

    score(well_formed("1/2"), "0.5")
    assert [result["failure_reason"] for result in asyncio.run(run())] == ["timeout"] * 4 + [""]


def test_cancelling_frees_the_worker():
    async def run():
        calls = [
            asyncio.create_task(compute_score("", well_formed("9^{9^{9^{9}}}"), "5", timeout_s=300.0)) for _ in range(2)
        ]
        await asyncio.sleep(0.5)
        for call in calls:
            call.cancel()
        return await asyncio.gather(*calls, return_exceptions=True)

    score(well_formed("1/2"), "0.5")
    assert [type(outcome) for outcome in asyncio.run(run())] == [asyncio.CancelledError] * 2
    assert score(well_formed("1/2"), "0.5")["score"] == 1.5


def test_workers_are_recycled(monkeypatch):
    monkeypatch.setattr(reward, "_TASKS_PER_WORKER", 2)
    reward.close_pool()
    score(well_formed("1/2"), "0.5")
    first = worker_pids()
    assert [score(well_formed(f"{n}/2"), f"\\frac{{{n}}}{{2}}")["score"] for n in range(6)] == [1.5] * 6
    assert not first & worker_pids()
    reward.close_pool()


def test_killed_workers_are_replaced():
    score(well_formed("1/2"), "0.5")
    for pid in worker_pids():
        psutil.Process(pid).kill()
    time.sleep(0.5)
    assert score(well_formed("1/2"), "0.5")["score"] == 1.5


def test_a_worker_that_dies_at_work_is_a_counted_failure(monkeypatch):
    """With one worker only: a second one that still warms up would look busy too."""

    async def run():
        (worker,) = map(psutil.Process, worker_pids())
        start = worker.cpu_times().user
        call = asyncio.create_task(compute_score("", well_formed("9^{9^{9^{9}}}"), "5", timeout_s=60.0))
        while worker.cpu_times().user < start + 0.2:
            await asyncio.sleep(0.05)
        worker.kill()
        return await call

    monkeypatch.setattr(reward, "_WORKERS", 1)
    reward.close_pool()
    try:
        score(well_formed("1/2"), "0.5")
        result = asyncio.run(run())
        assert (result["score"], result["verify_failure"]) == (-0.5, 1.0)
        assert result["failure_reason"] in ("error: ProcessExpired", "error: BrokenProcessPool")
        assert score(well_formed("1/2"), "0.5")["score"] == 1.5
    finally:
        reward.close_pool()


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
def test_the_memory_limit_holds():
    program = (
        "from iapo.reward import _limit_memory\n"
        "_limit_memory(2**28)\n"
        "small = bytearray(2**26)\n"
        "try:\n    large = bytearray(2**29)\n"
        "except MemoryError:\n    print('refused')\n"
    )
    assert output_of(program) == "refused\n"


def test_no_process_survives_a_killed_parent():
    """The parent is killed while a worker is at work, and can clean up nothing."""
    program = (
        "import asyncio\n"
        "from iapo.reward import compute_score\n"
        "text = '<answer>9^{9^{9^{9}}}</answer>'\n"
        "async def main():\n"
        "    await compute_score('', '<answer>1/2</answer>', '0.5')\n"
        "    print('ready', flush=True)\n"
        "    await compute_score('', text, '5', timeout_s=1.5)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        time.sleep(0.5)
        descendants = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    assert len(descendants) >= 2
    _, alive = psutil.wait_procs(descendants, timeout=10)
    # Where nothing reaps orphans, an ended process stays a zombie.
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


def test_timeout_must_be_positive():
    with pytest.raises(ValueError, match="timeout_s must be positive, got 0"):
        score(well_formed("1/2"), "0.5", timeout_s=0)


def test_importing_the_module_starts_nothing_and_loads_no_sympy():
    program = "import iapo.reward, sys; print('sympy' in sys.modules, 'verl' in sys.modules)"
    assert output_of(program) == "False False\n"
