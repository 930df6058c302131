"""One line per step on the console: what a person watching wants to know, with the time left."""

import sys
import time

from iapo.metrics.validation import validation


class ProgressConsole:
    """Backend of verl's `Tracking` (methods `log` and `finish`) in place of its line of a hundred numbers.

    Args:
        total_steps: training steps of the whole run.
    """

    def __init__(self, total_steps: int):
        self._total = total_steps
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
                parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        held_out = validation(step, data)
        if held_out:
            parts.append(f"held-out: accuracy {held_out.accuracy:.3f} tokens {held_out.tokens:.1f}")
        print("iapo: " + " | ".join(parts), flush=True, file=sys.stdout)

    def finish(self) -> None:
        pass
