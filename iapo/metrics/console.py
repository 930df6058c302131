"""One line per step on the console: what a person watching wants to know, with the time left."""

import sys
import time
from collections.abc import Iterator

from iapo.metrics.validation import validation

KNOWN = "choose the format= that the model knows"
# What teaches a model its format; iapo warmup writes the format `tags` alone.
TEACH = {"tags": f"begin with iapo warmup, or {KNOWN}"}
# Why completions get no verdict, by the metric of their share, and what a user can do where it is all of them.
WITHOUT_VERDICT = {
    "no_answer": "none has an answer in the format; {teach}",
    "several_answers": "each has several answers; {teach}",
    "unparsable": "math-verify finds no expression in the answers; look at them in validation/*.jsonl",
    "timeout": "math-verify takes too long; raise reward.custom_reward_function.reward_kwargs.timeout_s",
    "error": "the verifier failed on each; its log above says why",
}


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """A line now and then on work that takes long: how much is done, and the time left.

    Args:
        what: names the work.
        every: seconds between two lines; work that takes less prints none.
    """

    def __init__(self, what: str, every: float = 30.0):
        self._what, self._every = what, every
        self._begin = self._last = time.monotonic()

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < self._every or not 0 < done < total:
            return
        self._last = now
        left = (now - self._begin) / done * (total - done)
        print(f"iapo: {self._what}: {done} of {total} prompts, {clock(left)} left", flush=True, file=sys.stdout)


class ProgressConsole:
    """Backend of verl's `Tracking` (methods `log` and `finish`) in place of its line of a hundred numbers.

    Args:
        total_steps: training steps of the whole run.
        score, format: the run's `iapo.score` and `iapo.format`; the way out of a warning depends on them.
    """

    def __init__(self, total_steps: int, score: str, format: str):
        self._total, self._score, self._format = total_steps, score, format
        self._said: set[str] = set()
        self._first: tuple[int, float] | None = None  # step and when it ended; it takes long, so it isn't counted

    def log(self, data: dict, step: int) -> None:
        parts = []
        if "training/global_step" in data:
            parts = [f"step {step}/{self._total}"]
            for name, key, form in (
                ("accuracy", "iapo/reward/acc", ".3f"),
                ("reward", "critic/score/mean", ".3f"),
                ("tokens", "response_length/mean", ".1f"),
                ("nats/token", "iapo/information_rate", ".4f"),
                ("s/step", "timing_s/step", ".1f"),
            ):
                if key in data:
                    parts.append(f"{name} {float(data[key]):{form}}")
            now = time.monotonic()
            if self._first is None:
                self._first = step, now
            else:
                first, end = self._first
                left = (now - end) / (step - first) * (self._total - step)
                parts.append(f"{clock(left)} left")
        held_out = validation(step, data)
        if held_out:
            parts.append(f"held-out: accuracy {held_out.accuracy:.3f} tokens {held_out.tokens:.1f}")
        print("iapo: " + " | ".join(parts), flush=True, file=sys.stdout)
        for line in warnings_of(data, self._score, self._format):
            if line not in self._said:
                print(f"iapo: step {step}: {line}", flush=True, file=sys.stdout)
            self._said.add(line)

    def finish(self) -> None:
        pass


def warnings_of(data: dict, score: str, format: str) -> Iterator[str]:
    """What a step's metrics say about why nothing is learned."""
    teach = TEACH.get(format, KNOWN)
    for reason, fix in WITHOUT_VERDICT.items():
        if data.get(f"iapo/reward/{reason}") == 1:
            yield f"no completion was judged, all are {reason!r}: {fix.format(teach=teach)}."
    if data.get("iapo/reward/format") == 0 and data.get("iapo/reward/no_answer") != 1:
        yield f"no completion has the format; {teach}."
    if data.get("iapo/information_rate", 0) < 0:
        if score == "reference_answer":
            reason = "the right answer is less probable than before it, as where most answers are wrong"
            warmup = "; begin with iapo warmup if few are" if format in TEACH else ""
            fix = f"the rate counts in right ones alone{warmup}"
        else:
            layout = ", as where the first token after the probe is layout" if score == "first_token_entropy" else ""
            reason, fix = f"the model is less certain than before it{layout}", "try iapo.score=reference_answer"
        yield f"information is negative on average: after the reasoning {reason}; {fix}. See docs/metrics.md."
