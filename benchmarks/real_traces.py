"""What the scores say along real solutions: python -m benchmarks.real_traces MODEL [GSM8K_DIR] [--picture FILE]

The solutions of GSM8K's test split are read as traces of a model that knows the format: prompt of `iapo data`,
<think>, the solution, then the probe. Measured at every position are

    entropy    h_t = H(next token | prefix, probe)                       iapo.score=first_token_entropy (the paper)
    surprisal  h_t = -log p(right answer, answer_end | prefix, probe)    iapo.score=reference_answer

both with the probe's own tokens and written as the tokenizer would (iapo.probe_tokens=natural). The first table says
how much each falls, in how many traces, and in which quarter of the trace. The second says what natural tokens change:
at all positions, where they differ, and at ends of steps. The third says which tokens make a score fall: those of a
result, that is of a number after an equals sign, or others. Without GSM8K_DIR the traces are those of the embedded
task, for its models.

--layout compares forms of the entropy that read through layout instead, see benchmarks/layout.py. They are measured at
the five ends of the quarters.
"""

import argparse
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import pandas
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import layout
from benchmarks.measure import machine, table
from iapo.answer_format import EXIT_MARKER, FORMATS, THINK, AnswerFormat
from iapo.data.originals import ORIGINALS
from iapo.data.read import parse_rows, read_source
from iapo.data.write import to_rows
from iapo.information import Joins, exit_entropies
from iapo.launch.warmup import gsm8k
from iapo.probe.joins import measured
from iapo.probe.packing import Completion, probe_positions
from iapo.probe.text import answer_ids, decode, step_ends
from iapo.tasks import verbose_arithmetic

SCORES = ("entropy", "surprisal")
TOKENS = ("ids", "natural")
RESULT = re.compile(r"=\s*\$?(\d[\d,]*(?:\.\d+)?)")
KINDS = ("the answer as a result", "another result", "other")
COLUMNS = ["start", "end", "falls in", "1st quarter", "2nd", "3rd", "4th", "rank corr."]
LEGEND = "\nnats; the quarters are mean falls; the correlation is that of a trace's fall with the surprisal's."


def gsm8k_texts(folder: str, count: int, instruction: str) -> Iterator[tuple[list[dict], str, str]]:
    """(chat, reasoning, right answer) of the first solutions of the test split."""
    original = ORIGINALS["gsm8k"]
    rows = list(read_source("gsm8k", original, folder)["test"])[:count]
    examples = list(parse_rows(rows, original, folder))
    for row, made, example in zip(rows, to_rows(examples, "gsm8k", "test", instruction), examples, strict=True):
        yield made["prompt"], THINK + gsm8k(row, example.answer), example.answer


def embedded_texts(count: int) -> Iterator[tuple[list[dict], str, str]]:
    """(chat, reasoning, right answer) of the embedded task."""
    rng = random.Random(0)
    for _ in range(count):
        numbers = verbose_arithmetic.sample_problem(rng)
        chat = [{"role": "user", "content": verbose_arithmetic.prompt(numbers)}]
        reasoning = verbose_arithmetic.trace(numbers, rng).partition(EXIT_MARKER)[0]
        yield chat, reasoning, verbose_arithmetic.answer(numbers)


def traces(folder: str | None, tokenizer, count: int, form: AnswerFormat) -> list[tuple[Completion, torch.Tensor]]:
    """(what is measured, the right answer's tokens) of so many solutions."""
    found = []
    texts = gsm8k_texts(folder, count, form.instruction) if folder else embedded_texts(count)
    for chat, reasoning, answer in texts:
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = [torch.tensor(tokenizer.encode(text, add_special_tokens=False)) for text in (prompt, reasoning)]
        completion = Completion(*ids, probe_positions(len(ids[1])))
        found.append((completion, answer_ids(tokenizer, answer + form.answer_end)))
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
    for (completion, answer), here in said(list(zip(rows, joined, strict=True))):
        for score in SCORES:
            whole = completion._replace(answer=answer if score == "surprisal" else None)
            (ids,) = measured([whole], joins["ids"], measure)
            natural = ids.clone()
            if here.any():
                (h,) = measured([whole._replace(positions=here.nonzero().flatten())], joins["natural"], measure)
                natural[here] = h[here]
            values[score, "ids"].append(ids)
            values[score, "natural"].append(natural)
    return values


def quarter_ends(last: int) -> list[int]:
    return [round(k * last / 4) for k in range(5)]


def quarters(h: torch.Tensor) -> list[float]:
    """How much h falls in each quarter of a trace."""
    return [(h[a] - h[b]).item() for a, b in pairwise(quarter_ends(len(h) - 1))]


def row(names: list[str], hs: list[torch.Tensor], surprisals: list[torch.Tensor]) -> list[str]:
    """A row of the table: what h says along all traces."""
    fall, other = (torch.stack([h[0] - h[-1] for h in some]) for some in (hs, surprisals))
    correlation = pandas.DataFrame({"a": fall, "b": other}).corr("spearman").iloc[0, 1]
    return [
        *names, *(f"{torch.stack([h[end] for h in hs]).mean():.2f}" for end in (0, -1)),
        f"{int((fall > 0).sum())} of {len(hs)}",
        *(f"{x:+.2f}" for x in torch.tensor([quarters(h) for h in hs]).mean(0).tolist()), f"{correlation:.2f}",
    ]  # fmt: skip


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


def kinds(texts: Sequence[str], answer: str) -> list[str]:
    """Of each token of a solution the kind: does it write a result, and is that the right answer?

    Args:
        texts: of the tokens, in order.
        answer: a number without thousands separators.
    """
    ends = list(accumulate(map(len, texts)))
    found = ["other"] * len(texts)
    for match in RESULT.finditer("".join(texts)):
        kind = "the answer as a result" if match[1].replace(",", "") == answer else "another result"
        for i, (end, text) in enumerate(zip(ends, texts, strict=True)):
            if match.start(1) < end and end - len(text) < match.end(1):
                found[i] = kind
    return found


def falls(hs: Mapping[str, list[torch.Tensor]], of: Sequence[str]) -> list[list[str]]:
    """A row per kind: its share of the tokens, and of each score the mean fall per token and per trace.

    Args:
        hs: h of every trace by score, (R_i + 1,) nats.
        of: the kind of every token, of all traces in a row.
    """
    gains = {name: torch.cat([h[:-1] - h[1:] for h in some]) for name, some in hs.items()}
    rows = []
    for kind in KINDS:
        here = torch.tensor([k == kind for k in of])
        cells = [f"{here.float().mean():.1%}"]
        for name, gain in gains.items():
            per_token = f"{gain[here].mean():+.3f}" if here.any() else "-"
            cells += [per_token, f"{gain[here].sum() / len(hs[name]):+.2f}"]
        rows.append([kind, *cells])
    return rows


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


def said(rows: list) -> Iterator:
    """The rows, with what is left on stderr."""
    start = time.monotonic()
    for number, value in enumerate(rows, 1):
        yield value
        left = (time.monotonic() - start) / number * (len(rows) - number)
        print(f"\r{number} of {len(rows)} traces, {left:.0f} s left   ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def compare_layout(model, tokenizer, rows: list[tuple[Completion, torch.Tensor]]) -> None:
    """Print the table of the forms that read through layout, and the probabilities that they rest on."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    layout_V, digit_V = layout.kinds(tokenizer, model.config.vocab_size)
    values: dict[str, list[torch.Tensor]] = defaultdict(list)
    masses: dict[str, list[torch.Tensor]] = defaultdict(list)
    surprisals = []
    for completion, answer in said(rows):
        short = completion._replace(positions=torch.tensor(quarter_ends(len(completion.response))))
        found, rests = layout.forms(model, encode, short, layout_V, digit_V)
        for kept, new in ((values, found), (masses, rests)):
            for name, h in new.items():
                kept[name].append(h)
        (h,) = exit_entropies(model, [short._replace(answer=answer)], encode(FORMATS["tags"].probe))
        surprisals.append(h[short.positions])
    print(f"{len(rows)} traces; {machine('cpu')}\n")
    lines = [row([name], hs, surprisals) for name, hs in values.items()]
    print(table(["form", *COLUMNS], [*lines, row(["surprisal"], surprisals, surprisals)]))
    print(LEGEND + "\n")
    means = [[name, *(f"{p:.3f}" for p in torch.stack(ps).mean(0)[[0, 2, -1]].tolist())] for name, ps in masses.items()]
    print(table(["probability of", "start", "middle", "end"], means))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "data", metavar="GSM8K_DIR", nargs="?", help="a folder with train* and test*, in the original's columns"
    )
    parser.add_argument("--traces", type=int, default=100)
    parser.add_argument("--format", choices=("tags", "boxed"), default="tags")
    parser.add_argument("--picture", type=Path, help="draw both scores along the traces, as PNG")
    parser.add_argument("--layout", action="store_true", help="compare the forms that read through layout instead")
    options = parser.parse_args(arguments)
    if options.layout and options.format != "tags":
        parser.error("--layout: is measured with --format tags only; leave one of them out")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    form = FORMATS[options.format]
    rows = traces(options.data, tokenizer, options.traces, form)
    if options.layout:
        return compare_layout(model, tokenizer, rows)
    probe_ids = tokenizer.encode(form.probe, add_special_tokens=False)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    joins = {how: Joins(encode, partial(decode, tokenizer), form.probe, how == "natural") for how in TOKENS}
    join, plain = joins["natural"].join, joins["natural"].join(None, None)
    joined = [positions(completion, lambda token: join(token, None) != plain) for completion, _ in rows]
    values = scores_along(partial(exit_entropies, model, probe_ids=probe_ids), rows, joins, joined)
    tokens = sum(len(completion.response) for completion, _ in rows)
    print(f"{len(rows)} traces, {tokens} tokens, format {form.name}; {machine('cpu')}\n")
    lines = [row(list(names), hs, values["surprisal", "ids"]) for names, hs in values.items()]
    print(table(["score", "probe", *COLUMNS], lines))
    print(LEGEND)
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
    of = []
    for completion, answer in rows:
        right = decode(tokenizer, answer.tolist()).removesuffix(form.answer_end).replace(",", "")
        of += kinds([decode(tokenizer, [token]) for token in completion.response.tolist()], right)
    header = ["the token writes", "tokens", *(f"{score}, {per}" for score in SCORES for per in ("a token", "a trace"))]
    print("\n" + table(header, falls({score: values[score, "ids"] for score in SCORES}, of)))
    print("\nmean falls in nats, with the probe's own tokens.")
    if options.picture:
        draw(values, options.picture)


if __name__ == "__main__":
    main()
