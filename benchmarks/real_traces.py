"""What the scores say along real solutions: python -m benchmarks.real_traces MODEL GSM8K_DIR [--picture FILE]

The solutions of GSM8K's test split are read as traces of a model that knows the format: prompt of `iapo data`,
<think>, the solution, then the probe. Measured at every position are

    entropy    h_t = H(next token | prefix, probe)                       iapo.score=first_token_entropy (the paper)
    surprisal  h_t = -log p(right answer, answer_end | prefix, probe)    iapo.score=reference_answer

both with the probe's own tokens and written as the tokenizer would (iapo.probe_tokens=natural). The first table says
how much each falls, in how many traces, and in which quarter of the trace. The second says what natural tokens change:
at all positions, where they differ, and at ends of steps.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import pandas
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import machine, table
from iapo.answer_format import FORMATS, THINK, AnswerFormat
from iapo.data.originals import ORIGINALS
from iapo.data.read import parse_rows, read_source
from iapo.data.write import to_rows
from iapo.information import Joins, exit_entropies
from iapo.launch.warmup import gsm8k
from iapo.probe.joins import measured
from iapo.probe.packing import Completion, probe_positions
from iapo.probe.text import answer_ids, decode, step_ends

SCORES = ("entropy", "surprisal")
TOKENS = ("ids", "natural")


def traces(folder: str, tokenizer, count: int, form: AnswerFormat) -> list[tuple[Completion, torch.Tensor]]:
    """(what is measured, the right answer's tokens) of the first solutions of the test split."""
    original = ORIGINALS["gsm8k"]
    rows = list(read_source("gsm8k", original, folder)["test"])[:count]
    examples = list(parse_rows(rows, original, folder))
    found = []
    for row, made, example in zip(rows, to_rows(examples, "gsm8k", "test", form.instruction), examples, strict=True):
        prompt = tokenizer.apply_chat_template(made["prompt"], tokenize=False, add_generation_prompt=True)
        ids = [
            torch.tensor(tokenizer.encode(text, add_special_tokens=False))
            for text in (prompt, THINK + gsm8k(row, example.answer))
        ]
        answer = answer_ids(tokenizer, example.answer + form.answer_end)
        found.append((Completion(*ids, probe_positions(len(ids[1]))), answer))
    return found


def scores_along(
    measure: Callable[[Sequence[Completion]], list[torch.Tensor]],
    rows: Sequence[tuple[Completion, torch.Tensor]],
    joins: Mapping[str, Joins],
    joined: Sequence[torch.Tensor],
) -> dict[tuple[str, str], list[torch.Tensor]]:
    """By score and by how the probe is written: h of every trace, (R_i + 1,) nats.

    Args:
        rows: of `traces`.
        joins: by how the probe is written, a key of `TOKENS`.
        joined: (R_i + 1,) bool, where natural tokens differ. Only there they are measured apart.
    """
    values: dict[tuple[str, str], list[torch.Tensor]] = {(s, t): [] for s in SCORES for t in TOKENS}
    start = time.monotonic()
    for number, ((completion, answer), here) in enumerate(zip(rows, joined, strict=True), 1):
        for score in SCORES:
            whole = completion._replace(answer=answer if score == "surprisal" else None)
            (ids,) = measured([whole], joins["ids"], measure)
            natural = ids.clone()
            if here.any():
                (h,) = measured([whole._replace(positions=here.nonzero().flatten())], joins["natural"], measure)
                natural[here] = h[here]
            values[score, "ids"].append(ids)
            values[score, "natural"].append(natural)
        left = (time.monotonic() - start) / number * (len(rows) - number)
        print(f"\r{number} of {len(rows)} traces, {left:.0f} s left   ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return values


def quarters(h: torch.Tensor) -> list[float]:
    """How much h falls in each quarter of a trace."""
    ends = [round(k * (len(h) - 1) / 4) for k in range(5)]
    return [(h[a] - h[b]).item() for a, b in pairwise(ends)]


def positions(completion: Completion, counts: Callable[[int], bool]) -> torch.Tensor:
    """(R + 1,) whether the token before a position counts; at position 0 there is none."""
    return torch.tensor([False, *map(counts, completion.response.tolist())])


def changes(ids: Sequence[torch.Tensor], natural: Sequence[torch.Tensor], chosen: Sequence[torch.Tensor]) -> list[str]:
    """What natural tokens change at some positions.

    Args:
        ids, natural: h of every trace with either tokens, (R_i + 1,) nats.
        chosen: (R_i + 1,) bool, the positions that count.

    Returns:
        Cells: share of positions; of h the mean change, the mean and largest absolute change; of the gains of the
        tokens just before and after these positions the mean absolute value with `ids` and with `natural`, and the
        correlation of the two. "-" where no position counts.
    """
    here = torch.cat(list(chosen))
    moved = (torch.cat(list(natural)) - torch.cat(list(ids)))[here]
    beside = torch.cat([c[:-1] | c[1:] for c in chosen])
    gains = [torch.cat([h[:-1] - h[1:] for h in hs])[beside] for hs in (ids, natural)]
    share = f"{here.float().mean():.1%}"
    if not len(moved):
        return [share, *"------"]
    sizes = [moved.abs().mean(), moved.abs().max(), *(gain.abs().mean() for gain in gains)]
    correlation = torch.corrcoef(torch.stack(gains))[0, 1]
    return [share, f"{moved.mean():+.3f}", *(f"{x:.3f}" for x in sizes), f"{correlation:.2f}"]


def draw(values: dict[tuple[str, str], list[torch.Tensor]], file: Path) -> None:
    """Mean and middle half of both scores over the share of the trace that is read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = {"entropy": "entropy of the first answer token (paper)", "surprisal": "surprisal of the right answer"}
    share = torch.linspace(0, 1, 101)
    for ax, score in zip(axes, SCORES, strict=True):
        rows = torch.stack([h[(share * (len(h) - 1)).round().long()] for h in values[score, "ids"]])
        low, high = rows.quantile(torch.tensor([0.25, 0.75]), 0)
        ax.fill_between(100 * share, low, high, alpha=0.25, color="#0072b2", linewidth=0, label="middle half")
        ax.plot(100 * share, rows.mean(0), color="#0072b2", label="mean")
        ax.set(title=names[score], xlabel="% of the solution read", ylabel="nats", ylim=(0, None))
        ax.title.set_size(10)
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", metavar="GSM8K_DIR", help="a folder with train* and test*, in the original's columns")
    parser.add_argument("--traces", type=int, default=100)
    parser.add_argument("--format", choices=("tags", "boxed"), default="tags")
    parser.add_argument("--picture", type=Path, help="draw both scores along the traces, as PNG")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    form = FORMATS[options.format]
    probe_ids = tokenizer.encode(form.probe, add_special_tokens=False)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    joins = {how: Joins(encode, partial(decode, tokenizer), form.probe, how == "natural") for how in TOKENS}
    join, plain = joins["natural"].join, joins["natural"].join(None, None)
    rows = traces(options.data, tokenizer, options.traces, form)
    joined = [positions(completion, lambda token: join(token, None) != plain) for completion, _ in rows]
    values = scores_along(partial(exit_entropies, model, probe_ids=probe_ids), rows, joins, joined)
    tokens = sum(len(completion.response) for completion, _ in rows)
    print(f"{len(rows)} traces, {tokens} tokens, format {form.name}; {machine('cpu')}\n")
    falls = {key: torch.stack([h[0] - h[-1] for h in hs]) for key, hs in values.items()}
    lines = []
    for (score, how), hs in values.items():
        fall = falls[score, how]
        parts = torch.tensor([quarters(h) for h in hs]).mean(0)
        correlation = pandas.DataFrame({"a": fall, "b": falls["surprisal", "ids"]}).corr("spearman").iloc[0, 1]
        lines.append([
            score, how, *(f"{torch.stack([h[end] for h in hs]).mean():.2f}" for end in (0, -1)),
            f"{int((fall > 0).sum())} of {len(hs)}", *(f"{x:+.2f}" for x in parts.tolist()), f"{correlation:.2f}",
        ])  # fmt: skip
    header = ["score", "probe", "start", "end", "falls in", "1st quarter", "2nd", "3rd", "4th", "rank corr."]
    print(table(header, lines))
    print("\nnats; the quarters are mean falls; the correlation is that of a trace's fall with the surprisal's.")
    ends = step_ends(partial(decode, tokenizer), len(tokenizer)).tolist()
    stops = [positions(c, ends.__getitem__) for c, _ in rows]
    places = {
        "all": [torch.ones_like(j) for j in joined],
        "joined": joined,
        "step ends": stops,
        "joined step ends": [j & s for j, s in zip(joined, stops, strict=True)],
    }
    header = ["score", "positions", "share", "change", "|change|", "largest", "|gain| ids", "natural", "corr."]
    lines = [
        [score, place, *changes(values[score, "ids"], values[score, "natural"], chosen)]
        for score in SCORES
        for place, chosen in places.items()
    ]
    print("\n" + table(header, lines))
    print("\nnats, of natural less ids; the gains are those of the tokens just before and after such a position.")
    if options.picture:
        draw(values, options.picture)


if __name__ == "__main__":
    main()
