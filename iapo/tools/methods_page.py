"""docs/methods.md, generated from the recipes of the variants and the docstrings of their methods.

    python -m iapo.tools.methods_page            writes it
    python -m iapo.tools.methods_page --check    exits with 1 if it is stale

The first comment of a recipe names the method, its paper and what it does. The docstring of the method's class follows.
Both have the same form: paragraphs, and equations that are indented by four spaces.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import yaml

from iapo.config import IapoConfig
from iapo.methods import Method, acts_by

ROOT = Path(__file__).parents[2]
RECIPES, PAGE = ROOT / "recipes" / "variant", ROOT / "docs" / "methods.md"
COMMAND = "python -m iapo.tools.methods_page"

# What a hook of a method or a key of a recipe acts on, in the order of a training step.
ACTS_ON = {
    "algorithm.filter_groups": "sampling",
    "keep_completions": "sampling",
    "shape_reward": "reward",
    "reward": "reward",
    "outcome_advantage": "advantage",
    "iapo": "advantage",
    "algorithm.adv_estimator": "advantage",
    "algorithm.norm_adv_by_std_in_grpo": "advantage",
    "token_weight": "token weights",
    "loss_mask": "loss mask",
    "actor_rollout_ref.actor": "loss",
}
LABELS = "Source|Degenerate cases|Differences"
INTRO = f"""\
# The methods

Every variant of `recipes/variant`: its equation, its source, what it does in degenerate cases, how it differs from its
paper and from released code, and its knobs with the values of the recipe. [adding-a-method.md](adding-a-method.md) adds
a method. `{COMMAND}` writes this page from the recipes and the docstrings; edit those.

```bash
iapo train variant=gfpo methods.gfpo.k=3
iapo train 'variant=[iapo_rate,gfpo]'       # several add up; a later one wins where two set the same key
```

Notation: completion i answers the prompt of its group. `r_i` is its reward, `L_i` its length in tokens, t a position in
it, and A its advantage. Entropies are in nats. A mean or std is over the group unless it says otherwise.

"""


@dataclass(frozen=True)
class Variant:
    """A recipe of recipes/variant.

    Attributes:
        name: of the file, as in `variant=NAME`.
        title: the method's name in the literature.
        papers: arXiv numbers.
        summary: what it does, in a few words.
        text: what the recipe's comment says after its first paragraph.
        base: the variant that it builds on, or "".
        classes: the class of each section that has knobs, by the section's dotted name.
        settings: the values that it sets, by dotted key.
    """

    name: str
    title: str
    papers: list[str]
    summary: str
    text: str
    base: str
    classes: dict[str, type]
    settings: dict[str, object]


def read(name: str, recipe: str) -> Variant:
    """A variant from the text of its recipe.

    Raises:
        ValueError: the recipe doesn't begin with the comment that this page needs.
    """
    comment = re.match(r"(?:# @package _global_\n)?((?:#.*\n)*)", recipe)[1]
    first, _, text = re.sub("^# ?", "", comment, flags=re.M).partition("\n\n")
    head = re.fullmatch(r"(.+?) \((.*?\d{4}\.\d{5}.*?)\): (.*)", " ".join(first.split()))
    if not head:
        raise ValueError(f"{name}.yaml: {first!r} must be 'NAME (arXiv NUMBER): what it does.', as its first comment.")
    values = yaml.safe_load(recipe)
    base = next(iter(values.pop("defaults", [])), "")
    classes = {"iapo": IapoConfig} if "iapo" in values else {}
    for method, knobs in values.get("methods", {}).items():
        module, _, cls = knobs.pop("_target_").rpartition(".")
        classes[f"methods.{method}"] = getattr(import_module(module), cls)
    papers = re.findall(r"\d{4}\.\d{5}", head[2])
    return Variant(name, head[1], papers, head[3], text, base, classes, dict(flat(values)))


def flat(section: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of everything in a nested mapping."""
    for key, value in section.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def acts_on(variant: Variant, variants: dict[str, Variant]) -> list[str]:
    """What a variant and the one that it builds on act on.

    Raises:
        ValueError: a key that `ACTS_ON` doesn't know.
    """
    names = [key for key in variant.settings if not key.startswith("methods.")]
    names += [hook for cls in variant.classes.values() if issubclass(cls, Method) for hook in acts_by(cls())]
    found = acts_on(variants[variant.base], variants) if variant.base else []
    for name in names:
        known = [what for prefix, what in ACTS_ON.items() if f"{name}.".startswith(f"{prefix}.")]
        if not known:
            raise ValueError(f"{variant.name}.yaml: {name}: acts on something unknown; add it to {__name__}.ACTS_ON.")
        found += known
    return [what for what in dict.fromkeys(ACTS_ON.values()) if what in found]


def attributes(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say about each attribute."""
    found = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for name, meaning in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", text, flags=re.M):
            found[name] = " ".join(meaning.split())
    return found


def knob_rows(section: str, cls: type, settings: dict[str, object]) -> Iterator[list[str]]:
    """The rows of the knobs of a class that a recipe sets: dotted key, value, meaning.

    Raises:
        ValueError: the docstring says nothing about one of them.
    """
    meaning = attributes(cls)
    for key, value in settings.items():
        prefix, _, name = key.rpartition(".")
        if prefix == section:
            if name not in meaning:
                raise ValueError(f"{cls.__name__}.{name}: is not in the docstring; describe it under Attributes.")
            yield [f"`{key}`", f"`{shown(value)}`", meaning[name].rstrip(".")]


def markdown(text: str) -> str:
    """The paragraphs of a docstring or comment, with equations in fences and labels in bold."""
    blocks = []
    for block in text.strip("\n").split("\n\n"):
        if block.startswith("    "):
            equation = inspect.cleandoc("\n" + block)
            if blocks and blocks[-1].endswith("```"):
                blocks[-1] = f"{blocks[-1][:-3]}\n{equation}\n```"
            else:
                blocks.append(f"```text\n{equation}\n```")
        else:
            blocks.append(re.sub(rf"^({LABELS}):", r"**\1:**", block))
    return "\n\n".join(blocks)


def shown(value: object) -> str:
    """A value of a recipe; an interpolation by the name of the key that it refers to."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = re.sub(r"\$\{iapo\.part:\$\{([\w.]+)\},([\d./]+)\}", r"\2 of \1", text)
    text = re.sub(r"\$\{iapo\.mini_batch:\$\{([\w.]+)\},(\d+)\}", r"1/\2 of \1", text)
    return re.sub(r"\$\{([\w.]+)\}", r"\1", text)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def links(papers: list[str]) -> str:
    """arXiv numbers with links."""
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in papers)


def section(variant: Variant, variants: dict[str, Variant]) -> str:
    """The part of the page on one variant."""
    facts = [f"- paper: arXiv {links(variant.papers)}", f"- acts on: {', '.join(acts_on(variant, variants))}"]
    if variant.base:
        facts.append(f"- builds on: [`{variant.base}`](#{variant.base})")
    text, rows = [markdown(variant.text)], []
    for name, cls in variant.classes.items():
        if issubclass(cls, Method):
            file = cls.__module__.replace(".", "/") + ".py"
            facts.append(f"- code: [{file}](../{file})")
            text.append(markdown(inspect.getdoc(cls).partition("Attributes:\n")[0]))
        rows += knob_rows(name, cls, variant.settings)
    others = [
        f"- `{key}`: `{shown(value)}`"
        for key, value in variant.settings.items()
        if key.rpartition(".")[0] not in variant.classes
    ]
    blocks = [f"## `{variant.name}`", f"**{variant.title}**: {variant.summary}", "\n".join(facts), *text]
    blocks.append(table(["knob", "recipe's value", "meaning"], rows) if rows else "")
    blocks.append("Settings of verl:\n\n" + "\n".join(others) if others else "")
    return "\n\n".join(filter(None, blocks))


def page(recipes: dict[str, str]) -> str:
    """The page, from the text of each recipe by its name."""
    variants = {name: read(name, recipe) for name, recipe in sorted(recipes.items())}
    rows = [
        [f"[`{v.name}`](#{v.name})", f"{v.title}: {v.summary}", links(v.papers), ", ".join(acts_on(v, variants))]
        for v in variants.values()
    ]
    index = table(["variant", "what it does", "arXiv", "acts on"], rows)
    return "\n\n".join([INTRO + index, *(section(v, variants) for v in variants.values())]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    options = parser.parse_args(arguments)
    if not RECIPES.is_dir():
        sys.exit(f"iapo.tools.methods_page: {RECIPES}: no such folder; run it from a checkout")
    text = page({path.stem: path.read_text() for path in RECIPES.glob("*.yaml")})
    if not options.check:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        sys.exit(f"iapo.tools.methods_page: docs/methods.md: stale; run {COMMAND}")


if __name__ == "__main__":
    main()
