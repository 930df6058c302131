"""What is kept on an embedded task, and the best there is: python -m benchmarks.front TASK MODEL_OR_RUN ...

MODEL is a folder of transformers' form, whose completions are sampled; RUN is a run's folder, whose last validation is
read. The first table says how many tokens each has, and how much of the work that pays and of the work that doesn't:

- worked_sums: filler words, and the additions worked by columns where these are needed, between, and not.
- checked_registers: the needed products that are checked, of pairs that the model never learned and of others; the
  checked products that nobody needs; the share of the needed steps that are there; steps per completion that nobody
  needs.

The second table says how often its steps are right, by form.

The front is what a policy could reach that makes no more mistakes than the first MODEL or RUN, leaves out what is of no
use to anyone, and works an addition or checks a product only where that pays. The last column of the first table is the
regret: how far an accuracy is below the front at as many tokens. It is negative where training made the steps
themselves more accurate.
"""

import argparse
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.front import Point, at_price, front, regret
from benchmarks.front.oracles import ORACLES
from benchmarks.measure import table
from iapo.tasks.embedded import Problem
from iapo.tasks.tiny_model import complete
from iapo.tools.evaluate import last_dump, read_samples

PRICES = (1, 0.01, 0.003, 0.001, 0)
SEED = 1_000_003  # that of tiny_model's evaluation


class Written(NamedTuple):
    """The completions of a model or a run: their problems, mean length and accuracy, and what each keeps."""

    problems: list[Problem]
    policy: Point
    kept: list[Any]


def sampled(task: Any, model_dir: Path, prompts: int) -> Written:
    rng = random.Random(SEED)
    problems = [task.sample_problem(rng) for _ in range(prompts)]
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    completions = complete(model, tokenizer, problems, SEED, task)
    right = [task.extract_answer(c.text) == task.answer(p) for c, p in zip(completions, problems, strict=True)]
    policy = Point(fmean(completion.tokens for completion in completions), fmean(right))
    return Written(problems, policy, [task.kept(p, c.text) for p, c in zip(problems, completions, strict=True)])


def validated(task: Any, run_dir: Path) -> Written:
    """The last validation of a run.

    Raises:
        ValueError: it has none, or one without texts or of another task.
    """
    dump = last_dump(run_dir)
    samples = read_samples(dump)
    texts = [sample.text for sample in samples if sample.text is not None]
    if not samples or len(texts) < len(samples):
        raise ValueError(f"{dump}: holds no completions with a text 'output'; validate the run again.")
    problems = [task.parse_prompt(sample.prompt) for sample in samples]
    policy = Point(fmean(sample.tokens for sample in samples), fmean(sample.correct for sample in samples))
    return Written(problems, policy, [task.kept(p, text) for p, text in zip(problems, texts, strict=True)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.front", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=ORACLES, metavar="TASK", help=", ".join(ORACLES))
    parser.add_argument("paths", nargs="+", type=Path, metavar="MODEL_OR_RUN")
    parser.add_argument("--prompts", type=int, default=1024, help="sampled of a model, default 1024")
    options = parser.parse_args(arguments)
    if options.prompts < 1:
        print("benchmarks.front: --prompts must be at least 1.", file=sys.stderr)
        return 2
    oracle = ORACLES[options.task]
    try:
        found = {
            path.name: sampled(oracle.task, path, options.prompts)
            if (path / "config.json").is_file()
            else validated(oracle.task, path)
            for path in options.paths
        }
        rates = oracle.right_rates(next(iter(found.values())).kept)
        fronts = {name: front([oracle.ways(p, rates) for p in row.problems]) for name, row in found.items()}
    except ValueError as error:
        print(f"benchmarks.front: {error}", file=sys.stderr)
        return 2
    print_tables(oracle, found, fronts)
    return 0


def print_tables(oracle: ModuleType, found: Mapping[str, Written], fronts: Mapping[str, list[Point]]) -> None:
    rows, rates = [], []
    for name, written in found.items():
        tokens, accuracy = written.policy
        kept = [f"{figure:.2f}" for figure in oracle.columns(written.kept)]
        rows.append([name, f"{accuracy:.3f}", f"{tokens:.1f}", *kept, f"{regret(fronts[name], written.policy):.3f}"])
        for form, row in oracle.rate_rows(oracle.right_rates(written.kept)).items():
            rates.append([", ".join(filter(None, (name, form))), *(f"{rate:.3f}" for rate in row)])
    print(table(["", "accuracy", "tokens", *oracle.COLUMNS, "regret"], rows) + "\n")
    print(table(["right", *oracle.RATES], rates) + "\n")
    best = next(iter(fronts.values()))
    priced = [(price, at_price(best, price)) for price in PRICES]
    print(
        table(
            ["price of a token", "accuracy", "tokens"],
            [[f"{price:g}", f"{point.accuracy:.3f}", f"{point.tokens:.1f}"] for price, point in priced],
        )
    )


if __name__ == "__main__":
    sys.exit(main())
