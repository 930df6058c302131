"""Where in a trace does the information fall? python -m benchmarks.roles [--model FOLDER] [--picture FILE]

Completions of the embedded model, or of one trained from it, are measured at every position, and each token of their
reasoning is given its role in verbose arithmetic: part of a necessary addition, of a repeated one, or filler. The table
says what the gains s and the paper's term, their z-score within a completion, amount to by role.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.density import PROBE, TINY, sample
from benchmarks.measure import machine, table
from iapo.advantage import masked_zscore
from iapo.information import exit_entropies
from iapo.packing import Completion, probe_positions

ROLES = ("opening marker", "operands", "result", "';' behind it", "repeated addition", "filler words")
ADDITION = re.compile(r"(?P<again>.*?)(?P<operands>\d+\+\d+=)(?P<result>\d+)(?P<end>;?)")


def roles(tokens: list[str]) -> list[str]:
    """The role of each token of a reasoning, by steps that end in ';'. What is no addition counts as filler."""
    found, step = [], []
    for token in tokens:
        if token == "<think>":
            found.append("opening marker")
            continue
        step.append(token)
        if token == ";":
            found += _of_step(step)
            step = []
    return found + _of_step(step)


def _of_step(step: list[str]) -> list[str]:
    """A necessary addition is written as such; a repeated one follows ' wait again:'."""
    match = ADDITION.fullmatch("".join(step))
    if not match:
        return ["filler words"] * len(step)
    if match["again"]:
        return ["repeated addition"] * len(step)
    result, end = match.start("result"), match.start("end")
    named, place = [], 0
    for token in step:
        named.append("operands" if place < result else "result" if place < end else "';' behind it")
        place += len(token)
    return named


def measure(folder: Path, prompts: int, group: int) -> dict[str, torch.Tensor]:
    """(tokens, 2) by role: the gain s in nats and its z-score within the completion."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = sample(model, tokenizer, prompts, group)
    completions = [Completion(prompt, response, probe_positions(len(response))) for prompt, response, _ in rows]
    values = exit_entropies(model, completions, tokenizer.encode(PROBE, add_special_tokens=False))
    found = defaultdict(list)
    for (_, response, _), h in zip(rows, values, strict=True):
        gains = -h.diff()
        terms = masked_zscore(gains, torch.ones_like(gains))
        for role, gain, term in zip(roles([tokenizer.decode(i) for i in response]), gains, terms, strict=True):
            found[role].append(torch.stack([gain, term]))
    return {role: torch.stack(found[role]) for role in ROLES if role in found}


def draw(found: dict[str, torch.Tensor], path: Path) -> None:
    """Bars: mean gain and mean term by role."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    names = list(found)[::-1]
    for column, (ax, title) in enumerate(
        zip(axes, ("mean gain [nats per token]", "mean of the paper's term (z-score)"), strict=True)
    ):
        means = [found[name][:, column].mean().item() for name in names]
        ax.barh(names, means, color=["tab:green" if mean > 0 else "tab:red" for mean in means])
        ax.axvline(0, color="black", lw=0.8)
        ax.set_xlabel(title)
        ax.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="a folder of transformers' form; default: embedded")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="completions of each")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").is_file():
        print(
            f"benchmarks.roles: --model: {options.model} holds no config.json; give a model's folder.", file=sys.stderr
        )
        return 2
    if min(options.prompts, options.group) < 1:
        print("benchmarks.roles: --prompts and --group must be at least 1.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    found = measure(options.model, options.prompts, options.group)
    tokens, information = sum(map(len, found.values())), sum(x[:, 0].sum().item() for x in found.values())
    rows = [
        [
            role,
            f"{len(x) / tokens:.3f}",
            f"{x[:, 0].mean():+.4f}",
            f"{x[:, 0].std():.4f}",
            f"{x[:, 0].sum() / information:+.3f}",
            f"{x[:, 1].mean():+.3f}",
        ]
        for role, x in found.items()
    ]
    print(f"{tokens} tokens of {options.prompts * options.group} completions; {machine('cpu')}")
    print(table(["role", "of the tokens", "mean gain", "std", "of the information", "mean term"], rows))
    if options.picture:
        draw(found, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
