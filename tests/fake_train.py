"""Stands in for iapo.train in the tests of benchmarks.reproduce_table: writes what a run writes, in no time.

FAKE in the environment, JSON, says by the run folder's name what differs:
    {"gfpo-2-seed0": {"validation": [Pass@1, tokens], "test": [...]}}   results; 0.5 and 50 otherwise
    {"gfpo-2-seed0": {"test": [Pass@1, tokens, c, w]}}    works additions with c carries or more, and writes w words
    {"gfpo-2-seed0": "fail"}            fails with iapo.train's last line
    {"gfpo-2-seed0": "stay"}            trains until it is told to stop
    {"gfpo-2-seed0": "short"}           ends without its validation
"""

import json
import os
import signal
import sys
import time
from itertools import accumulate
from pathlib import Path

import pyarrow.parquet as pq

from iapo.answer_format import written
from iapo.tasks.worked_sums import answer, carries, columns, parse_prompt


def completion(prompt, fewest_carries, words):
    numbers, steps = parse_prompt(prompt), ""
    for a, b in zip(accumulate(numbers), numbers[1:], strict=False):
        steps += f"{a}+{b}{f':{columns(a, b)}' if carries(a, b) >= fewest_carries else ''}={a + b};"
    return written(steps + words * " hmm", answer(numbers))


def main():
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])  # of several the last
    folder = Path(given["run_dir"].strip("'"))
    script = json.loads(os.environ.get("FAKE", "{}")).get(folder.name, {})
    steps = int(given["trainer.total_training_steps"])
    with (folder.parent / "calls").open("a") as calls:
        calls.write(json.dumps([folder.name, given["trainer.val_only"], os.environ.get("RAY_ADDRESS")]) + "\n")
    if script == "stay":
        signal.signal(signal.SIGTERM, lambda *_: (print("iapo.train: stopped by SIGTERM"), sys.exit(143)))
        (folder / "here").touch()
        time.sleep(600)
    if script == "fail":
        print("a traceback", "iapo.train: the run failed: RuntimeError: no luck", "", sep="\n")
        sys.exit(1)
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        (folder / "config.yaml").write_text(json.dumps(given))
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"versions": {"commit": "abc", "torch": "2.0"}}) + "\n")
    trained = given["variant"] != "grpo" or not folder.name.startswith("untrained")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1) if trained else []:
            seconds = {"timing_s/step": 9.0 if step == 1 else float(step), "timing_s/save_checkpoint": 0.5}
            filtered = (
                {"training/filter_groups/evicted_samples": 4.0} if given["variant"] == "dapo" and step > 1 else {}
            )
            filtered |= {"training/filter_groups/discarded_surplus_samples": 2.0} if filtered and step == 4 else {}
            data = seconds | filtered | {"iapo/information_rate": 0.01 * step, "iapo/reward/acc": 0.5}
            file.write(json.dumps({"step": step, "data": data}) + "\n")
    if script == "short":
        return
    (folder / "validation").mkdir(exist_ok=True)
    with (folder / "validation" / f"{steps if trained else 0}.jsonl").open("w") as dump:
        rows = pq.read_table(given["data.val_files"].strip("'")).to_pylist()
        for split in dict.fromkeys(row["extra_info"]["split"] for row in rows):
            accuracy, tokens, *text = script.get(split, [0.5, 50])
            fewest_carries, words = text or (9, 0)
            prompts = [row["prompt"][0]["content"] for row in rows if row["extra_info"]["split"] == split]
            for number, prompt in enumerate(prompts):
                right = float(number < accuracy * len(prompts))
                record = {"input": prompt, "output": completion(prompt, fewest_carries, words)}
                record |= {"acc": right, "response_length": tokens, "truncated": 0}
                dump.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
