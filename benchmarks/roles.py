"""Where in a trace does the information fall? python -m benchmarks.roles [--score SCORE] [--picture FILE]

Completions of the embedded model, or of one trained from it, are measured at every position, and each token of their
reasoning is given its role in verbose arithmetic: part of a necessary addition, of a repeated one, or filler. The first
table says what the gains s and the term, their z-score within a completion, amount to by role. The second looks at the
first token after a necessary addition, where the model has the choice: continue, repeat it, or write filler. The third
says what the exploration adjustment gives to those tokens and to the digits of results, mistakes among them. The
last line says how far the information rate is a price on length alone. --runs instead counts the tokens of each role in
what runs wrote at their last validation.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter, defaultdict
from itertools import accumulate
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.density import PROBE, TINY, sample
from benchmarks.measure import machine, table
from iapo.advantage import exploration, masked_zscore, relative_information_rate
from iapo.answer_format import EXIT_MARKER
from iapo.information import entropy, exit_entropies
from iapo.probe.packing import Completion, probe_positions
from iapo.tasks.verbose_arithmetic import FILLER_WORDS, REPEAT_WORDS, answer, extract_answer, parse_prompt
from iapo.tools.evaluate import last_dump, read_samples

ROLES = ("opening marker", "operands", "result", "';' after it", "repeated addition", "filler words")
CHOICES = ("continues", "repeats it", "writes filler")
EXPLORED = (
    "right digit, right answer",
    "right digit, wrong answer",
    "first wrong digit, wrong answer",
    *(f"{choice}, right answer" for choice in CHOICES),
)
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
        named.append("operands" if place < result else "result" if place < end else "';' after it")
        place += len(token)
    return named


def next_token_entropies(model, completions: list[Completion]) -> list[torch.Tensor]:
    """(L + 1,) nats each: entropy of the next token before each token of a reasoning and after the last one."""
    found = []
    for completion in completions:
        with torch.no_grad():
            logits = model(torch.cat([completion.prompt, completion.response])[None]).logits[0]
        found.append(entropy(logits[len(completion.prompt) - 1 :]))
    return found


def choice_of(token: str) -> str:
    return "repeats it" if token == REPEAT_WORDS[0] else "writes filler" if token in FILLER_WORDS else "continues"


def choices(tokens: list[str], found: list[str]) -> dict[int, str]:
    """What the first token after each necessary addition begins, by its place. `found` are the tokens' roles."""
    return {
        place + 1: choice_of(token)
        for place, (role, token) in enumerate(zip(found[:-1], tokens[1:], strict=True))
        if role == "';' after it"
    }


def digits(tokens: list[str]) -> dict[int, bool]:
    """Whether the digits of each addition's result are right, by their places, up to the first wrong one."""
    starts, found = [0, *accumulate(map(len, tokens))], {}
    for addition in re.finditer(r"(\d+)\+(\d+)=(\d+)", "".join(tokens)):
        place = starts.index(addition.start(3))
        for digit, true in zip(addition[3], str(int(addition[1]) + int(addition[2])), strict=False):
            found[place] = digit == true
            if digit != true:
                break
            place += 1
    return found


def explored(tokens: list[str], chosen: dict[int, str], correct: bool) -> dict[int, str]:
    """The tokens of a completion that the exploration's table is about, by place: what they are, of `EXPLORED`.
    `chosen` are the choices of its reasoning."""
    if not correct:
        return {place: EXPLORED[1] if right else EXPLORED[2] for place, right in digits(tokens).items()}
    right = [place for place, is_right in digits(tokens).items() if is_right]  # a few mistakes are made good later
    return dict.fromkeys(right, EXPLORED[0]) | {place: f"{chosen[place]}, right answer" for place in chosen}


def probability_and_exploration(model, prompt: torch.Tensor, response: torch.Tensor, correct: bool) -> torch.Tensor:
    """(T, 2) probability of each token and the exploration adjustment that the advantage would get for it."""
    with torch.no_grad():
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    log_probs_1T = logits.log_softmax(-1).gather(1, response[:, None]).T
    term_1T = exploration(log_probs_1T, torch.tensor([correct]), torch.ones_like(log_probs_1T))
    return torch.cat([log_probs_1T.exp(), term_1T]).T


def rate_and_shortness(values: list[torch.Tensor], lengths: list[int], correct: list[bool], groups: list) -> tuple:
    """(B,) each: the information rate's term, and what it would be if all told the same, norm(1 / tokens)."""
    mask_BT = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()
    h_BS = torch.stack([torch.cat([h[:1], h[-1:].expand(max(lengths))]) for h in values])  # only h_0 and h_T count
    same_BS = torch.cat([torch.ones(len(values), 1), torch.zeros(mask_BT.shape)], dim=1)
    return tuple(relative_information_rate(h, torch.tensor(correct), mask_BT, groups) for h in (h_BS, same_BS))


def measure(folder: Path, prompts: int, group: int, score: str) -> tuple[dict[str, torch.Tensor], float]:
    """(tokens, 2) by role and by choice: the gain s in nats and its z-score within the completion; of `EXPLORED`:
    probability and exploration term. And the correlation of the information rate's term with that of 1 / tokens, over
    right completions."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = sample(model, tokenizer, prompts, group)
    completions = [Completion(prompt, response, probe_positions(len(response))) for prompt, response, _ in rows]
    if score == "next_token_entropy":
        values = next_token_entropies(model, completions)
    else:
        values = exit_entropies(model, completions, tokenizer.encode(PROBE, add_special_tokens=False))
    questions = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt, _, _ in rows]
    texts = [text.removesuffix(tokenizer.eos_token) for _, _, text in rows]
    correct = [extract_answer(t) == answer(parse_prompt(q)) for t, q in zip(texts, questions, strict=True)]
    lengths, found = [], defaultdict(list)
    for (prompt, response, text), h, right in zip(rows, values, correct, strict=True):
        gains = -h.diff()
        both = torch.stack([gains, masked_zscore(gains, torch.ones_like(gains))], dim=1)
        tokens = [tokenizer.decode(i) for i in response]
        names = roles(tokens)
        for place, role in enumerate(names):
            found[role].append(both[place])
        chosen = choices(tokens, names)
        for place, choice in chosen.items():
            found[choice].append(both[place])
        whole = tokenizer.encode(text, add_special_tokens=False, return_tensors="pt")[0]
        lengths.append(len(whole))
        both = probability_and_exploration(model, prompt, whole, right)
        for place, name in explored([tokenizer.decode(i) for i in whole], chosen, right).items():
            found[name].append(both[place])
    pair = torch.stack(rate_and_shortness(values, lengths, correct, questions))[:, correct]
    correlation = torch.corrcoef(pair)[0, 1].item()
    return {name: torch.stack(found[name]) for name in (*ROLES, *CHOICES, *EXPLORED) if name in found}, correlation


def count(run: Path, tokenizer) -> list[str]:
    """A row: completions, and reasoning tokens of each role per completion, of a run's last validation.

    Raises:
        ValueError: it has none, or its dump is no dump of completions.
    """
    dump = last_dump(run)
    if not read_samples(dump):  # says what is wrong with which line
        raise ValueError(f"{dump}: holds no completion; validate the run again.")
    outputs = [json.loads(line).get("output") for line in dump.read_text().removesuffix("\n").split("\n")]
    if not all(isinstance(output, str) for output in outputs):
        raise ValueError(f"{dump}: a completion has no text 'output'; validate the run again.")
    texts = [output.partition(EXIT_MARKER)[0] for output in outputs]
    total = Counter()
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        total.update(roles([tokenizer.decode(i) for i in ids]))
    return [run.name, f"{len(texts)}", *(f"{total[role] / len(texts):.2f}" for role in ROLES)]


def draw(found: dict[str, torch.Tensor], path: Path) -> None:
    """Bars: mean gain and mean term by role."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    names = [role for role in ROLES if role in found][::-1]
    for column, (ax, title) in enumerate(zip(axes, ("mean gain [nats per token]", "mean term (z-score)"), strict=True)):
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
    parser.add_argument("--score", choices=("first_token_entropy", "next_token_entropy"), default="first_token_entropy")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="count roles in these run folders instead")
    options = parser.parse_args(arguments)
    if options.runs:
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        try:
            rows = [count(run, tokenizer) for run in options.runs]
        except ValueError as error:
            print(f"benchmarks.roles: --runs: {error}", file=sys.stderr)
            return 2
        print(table(["tokens per completion", "completions", *ROLES], rows))
        return 0
    if not (options.model / "config.json").is_file():
        print(
            f"benchmarks.roles: --model: {options.model} holds no config.json; give a model's folder.", file=sys.stderr
        )
        return 2
    if options.picture and not options.picture.absolute().parent.is_dir():
        print(f"benchmarks.roles: --picture: there is no folder {options.picture.parent}; make it.", file=sys.stderr)
        return 2
    if min(options.prompts, options.group) < 1:
        print("benchmarks.roles: --prompts and --group must be at least 1.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    found, correlation = measure(options.model, options.prompts, options.group, options.score)
    named = {role: found[role] for role in ROLES if role in found}
    tokens, information = sum(map(len, named.values())), sum(x[:, 0].sum().item() for x in named.values())
    rows = [
        [
            role,
            f"{len(x) / tokens:.3f}",
            f"{x[:, 0].mean():+.4f}",
            f"{x[:, 0].std():.4f}",
            f"{x[:, 0].sum() / information:+.3f}",
            f"{x[:, 1].mean():+.3f}",
        ]
        for role, x in named.items()
    ]
    print(f"{tokens} tokens of {options.prompts * options.group} completions, {options.score}; {machine('cpu')}")
    print(table(["role", "of the tokens", "mean gain", "std", "of the information", "mean term"], rows))
    rows = [
        [choice, f"{len(found[choice])}", f"{found[choice][:, 0].mean():+.4f}", f"{found[choice][:, 1].mean():+.3f}"]
        for choice in CHOICES
        if choice in found
    ]
    print("\n" + table(["after an addition it", "times", "mean gain", "mean term"], rows))
    rows = [
        [name, f"{len(found[name])}", f"{found[name][:, 0].mean():.3f}", f"{found[name][:, 1].mean():+.3f}"]
        for name in EXPLORED
        if name in found
    ]
    print("\n" + table(["token", "times", "mean probability", "mean exploration term"], rows))
    if options.score == "first_token_entropy" and math.isfinite(correlation):  # not of one completion per prompt
        print(f"\nInformation rate and 1 / tokens, right completions of a prompt: correlation {correlation:.3f}")
    if options.picture:
        draw(found, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
