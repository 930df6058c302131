"""Pass@k, lengths and truncation of a run's validation completions, with bootstrap intervals.

    iapo evaluate RUN_DIR_OR_JSONL ... [--k 1 4 8] [--step N] [--prompts FILE.parquet]

prints pass@k, mean tokens, ratio@k = pass@k / tokens, the truncation rate and, for the embedded tasks, tokens /
minimum, the fewest that answer their prompts. It reads the dumps that verl writes at each validation,
`RUN_DIR/validation/<step>.jsonl` (the last one, unless --step says otherwise): one completion per line with `input`,
the prompt; `acc`, 1 if the answer is right; `response_length` in tokens, end-of-sequence token included; `truncated`, 1
if it was cut at the longest allowed length. Several samples per prompt come from
actor_rollout_ref.rollout.val_kwargs.n. --prompts leaves only the prompts of one data file, where data.val_files named
several.

Shapes: P problems, F figures per problem, R resamples.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iapo.arguments import Parser
from iapo.tasks.embedded import TASKS
from iapo.tasks.reference import references

LABELS = {
    "tokens": "mean response tokens",
    "truncated": "truncation rate",
    "tokens/minimum": "tokens / known minimum",
}


class Sample(NamedTuple):
    """One completion; its text is None where a dump has none."""

    prompt: str
    correct: bool
    tokens: float
    truncated: bool
    text: str | None = None


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples is right, from n samples of which c are; unbiased.

        1 - C(n-c, k) / C(n, k)        (Chen et al., arXiv 2107.03374, section 2.1)

    It is 1 where fewer than k are wrong.

    Raises:
        ValueError: unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k: {k} must be from 1 to the {n} samples per problem; sample more, or lower it.")
    if not 0 <= c <= n:
        raise ValueError(f"c: {c} right ones of {n} samples; it must be from 0 to {n}.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(samples: Iterable[Sample], ks: Sequence[int] = (1,)) -> dict[str, float]:
    """The figures of a set of completions; each problem counts the same, however many samples it has.

        pass@k           mean over problems of the unbiased estimate, for 1 and every k of `ks`
        tokens           mean response tokens
        ratio@k          pass@k / tokens; NaN if no response has a token
        truncated        share of the completions that were cut
        tokens/minimum   tokens / mean of the fewest that the task's form allows. It is known for the embedded
                         tasks only. Below 1 if steps are left out.

    Raises:
        ValueError: no samples, or fewer of some problem than a k.
    """
    ks = _with_one(ks)
    return {name: float(value) for name, value in _combine(_figures(samples, ks).mean(0), ks).items()}


def bootstrap(
    samples: Iterable[Sample], ks: Sequence[int] = (1,), resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of what `evaluate` returns, over problems drawn with replacement.

    They say how much the figures depend on which problems were asked; a problem keeps its samples. They don't say what
    another seed of the training would give. One problem alone gives intervals of width 0.

    Raises:
        ValueError: as `evaluate`; level outside (0, 1), resamples below 1, a negative seed.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: {level} must be between 0 and 1.")
    for name, value, least in (("resamples", resamples, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: {value} must be at least {least}.")
    ks = _with_one(ks)
    figures_PF = _figures(samples, ks)
    rng, P = np.random.default_rng(seed), len(figures_PF)
    means_RF = np.stack([figures_PF[rng.integers(P, size=P)].mean(0) for _ in range(resamples)])
    tail = (1 - level) / 2
    return {
        name: tuple(float(bound) for bound in np.quantile(values_R, [tail, 1 - tail]))
        for name, values_R in _combine(means_RF, ks).items()
    }


def _with_one(ks: Sequence[int]) -> list[int]:
    return sorted({1, *ks})


def _figures(samples: Iterable[Sample], ks: Sequence[int]) -> np.ndarray:
    """(P, F): known minimum or NaN, mean tokens, share truncated, then pass@k for each k."""
    groups = by_problem(samples)
    if not groups:
        raise ValueError("samples: 0; give the completions of at least one problem.")
    rows = []
    # Sorted, because the order in dumps is random and intervals would depend on it.
    for prompt, group in sorted(groups.items()):
        n, c = len(group), sum(sample.correct for sample in group)
        tokens, truncated = (sum(values) / n for values in ([s.tokens for s in group], [s.truncated for s in group]))
        rows.append([known_minimum(prompt), tokens, truncated, *(pass_at_k(n, c, k) for k in ks)])
    return np.array(rows)


def _combine(means: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """The figures from means over problems, (..., F)."""
    minimum, tokens, truncated, *passed = np.moveaxis(means, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = {
            f"ratio@{k}": np.where(tokens > 0, value / tokens, np.nan) for k, value in zip(ks, passed, strict=True)
        }
    found = {f"pass@{k}": value for k, value in zip(ks, passed, strict=True)}
    found |= {"tokens": tokens} | ratios | {"truncated": truncated}
    return found if np.isnan(minimum).any() else found | {"tokens/minimum": tokens / minimum}


def by_problem(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """The samples of each prompt, in order."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample)
    return groups


def known_minimum(prompt: str) -> float:
    """The fewest response tokens that answer a prompt of an embedded task; NaN for other prompts.

    A sum is a prompt of both tasks of sums, and its minimum is the same in both.
    """
    for task in TASKS.values():
        with suppress(ValueError):
            return task.minimal_tokens(task.parse_prompt(prompt))
    return math.nan


# --- reading ---


def last_dump(run_dir: Path) -> Path:
    """The dump of a run's last validation.

    Raises:
        ValueError: there is none.
    """
    dumps = [path for path in (Path(run_dir) / "validation").glob("*.jsonl") if path.stem.isdecimal()]
    if not dumps:
        raise ValueError(f"{run_dir}: holds no validation/<step>.jsonl; give the folder of a run that has validated.")
    return max(dumps, key=lambda path: int(path.stem))


def read_samples(path: Path) -> list[Sample]:
    """The completions of a dump.

    Raises:
        ValueError: in one line with the number of the record, if the file is none or a value is missing or impossible.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read ({error}); give a run's folder or one of its dumps.") from None
    # Not splitlines, which also splits at separators that verl leaves as they are within a text, such as U+2028.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [_sample(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def _sample(line: str, where: str) -> Sample:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); the file was cut short or is no dump, give another.") from None
    if not isinstance(record, dict) or not isinstance(record.get("input"), str):
        raise ValueError(f"{where}: has no text 'input'; give a dump of verl's validation.")
    numbers = {}
    for name, low, high in (("acc", 0, 1), ("response_length", 0, math.inf), ("truncated", 0, 1)):
        value = record.get(name)
        if not isinstance(value, int | float) or not low <= value <= high or value == math.inf:
            raise ValueError(
                f"{where}: {name} is {value!r}, not a number from {low} to {high}; let the run use IapoRewardManager "
                "and a reward function that returns 'acc'."
            )
        numbers[name] = value
    if record.get("verify_failure") and "gts" in record:  # by iapo.reward; verl wrote the ground truth
        try:
            references(record["gts"])
        except ValueError as error:
            raise ValueError(
                f"{where}: gts, the ground truth, {error}, so no answer is right; correct reward_model.ground_truth of "
                "the data and validate again."
            ) from None
    correct, truncated = numbers["acc"] > 0.5, numbers["truncated"] > 0.5
    text = record["output"] if isinstance(record.get("output"), str) else None
    return Sample(record["input"], correct, float(numbers["response_length"]), truncated, text)


def read_prompts(path: Path) -> set[str]:
    """The prompts of a data file, as they are in dumps if the chat template adds nothing but special tokens.

    Raises:
        ValueError: it is no parquet file with verl's column `prompt`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        column = pq.read_table(path, columns=["prompt"])["prompt"].to_pylist()
        return {"".join(message["content"] for message in messages) for messages in column}
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--prompts: {path} is no parquet file with a column 'prompt' of chat messages ({reason}); give one."
        ) from None


def of_prompts(samples: Iterable[Sample], prompts: set[str]) -> list[Sample]:
    """The samples whose prompt is among these."""
    return [sample for sample in samples if sample.prompt in prompts]


# --- the command ---


def table(samples: Sequence[Sample], ks: Sequence[int], resamples: int = 1000, seed: int = 0) -> str:
    figures, intervals = evaluate(samples, ks), bootstrap(samples, ks, resamples, seed)
    lines = [f"{len(by_problem(samples))} problems, {len(samples)} completions; 95% interval over problems"]
    for name, value in figures.items():
        low, high = intervals[name]
        digits = 1 if name == "tokens" else 4
        lines.append(f"{LABELS.get(name, name):<24}{value:>9.{digits}f}   [{low:.{digits}f}, {high:.{digits}f}]")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 printed, 2 nothing to evaluate, with the reason in one line."""
    parser = Parser(prog="iapo evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_DIR_OR_JSONL")
    parser.add_argument("--k", nargs="+", type=int, default=[1], help="default 1")
    parser.add_argument("--step", type=int, help="of the validation; default: the last")
    parser.add_argument("--prompts", type=Path, help="evaluate the prompts of this parquet file only")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap, default 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap, default 0")
    options = parser.parse_intermixed_args(arguments)
    try:
        prompts = read_prompts(options.prompts) if options.prompts else None
        for path in options.paths:
            if path.is_dir():
                step = options.step
                path = last_dump(path) if step is None else path / "validation" / f"{step}.jsonl"
            samples = read_samples(path)
            if prompts is not None and not (samples := of_prompts(samples, prompts)):
                raise ValueError(
                    f"--prompts: {options.prompts} holds no prompt that {path} answers; give the file of its data."
                )
            if not samples:
                raise ValueError(f"{path}: holds no completion; give another run or dump.")
            print(f"{path}\n{table(samples, options.k, options.resamples, options.seed)}\n")
    except ValueError as error:
        print(f"iapo.evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
