"""Checked registers: the embedded task on which the generator knows which steps are needed and which checks pay.

After iGSM (arXiv 2407.20311), but tiny. A prompt defines eight registers modulo 53, in any order, and asks for one:

    c=42*a;a=17;e=08-c;b=42;d=a+b;f=39*e;g=f-d;h=30*c;g?

A completion begins with a plan, the registers that the query needs from the query back. Then it works registers out,
each after those that it is made of:

    <think>gfedc;c=42*a17=c25;d=a17+b42:04=d06;e=08-c25:41=e36;f=39*e36=f31?04+22:24=f26;g=f26-d06:26=g20;</think>
    <answer>20</answer>

A step names its register, copies the operands with their values, and ends in name and value. Without the plan a tiny
model has to trace up to five definitions back at once, and does not learn to in 2,500 steps; with it that is one look
per register.

- Sums and differences are *easy*: with the tens of the second operand (17+40 is 4), then with its units (6).
- A product is *fast*: its value is written at once. After it a *check* may work it out, with the tens of the second
  operand (39*30 is 4), with its units (39*6 is 22), and by the sum of the two as in an easy step (4+20 is 24, and 26).
  The value after a check counts, so a check corrects a fast value that is wrong.

Each number of an easy step or a check depends on one number and one digit, 530 cases at most, so that a tiny model
learns it. A fast product depends on two numbers. Most pairs are *unknown*: training leaves out the loss on their fast
values, so the model never learns them. A check pays there and nowhere else. Random slips would be another way to make a
model err, but reinforcement learning unlearns those at once; it can't find a thousand products by trial.

The few known pairs are what most prompts ask for. This is because a model that sees most pairs learns how to multiply,
and then knows the others too. Training on such facts alone showed it, modulo 97, with the tiny model and about as many
examples. Trained on 80% of all pairs it got 0.51 of these right after 3,000 steps, and 0.46 of the others. Trained on
12%, and on the products of checks, it got 0.99 and 0.10 after 1,200.

What a query doesn't need (h above) is written in the same form as what it needs, and is as easy to predict. So neither
the form of a step nor its entropy says whether it is of use; the plan does, to who can read it.

Some of the form is there so that a tiny model learns it. `c=` is one token, so that a definition is found by looking
for one. A number comes before the register: after the register's value it can be guessed, from the known pairs, and
then the model is slow to learn to look it up. The modulus is small: after 900 steps of training nearly all numbers of
easy steps are learned, modulo 97 half of them after 1,900.

Lengths are in tokens of the vocabulary of `iapo.tasks.tiny_model`: a marker, a number, the beginning of a definition or
step (`c=`) and every other character are one token each, and EOS counts. Every function is pure; randomness comes only
from the `random.Random` that the caller passes.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Mapping
from functools import cache
from operator import add, mul, sub
from statistics import fmean
from typing import NamedTuple

from iapo.answer_format import ANSWER_END, MARKERS, PROBE, THINK
from iapo.tasks.sums import extract_answer

__all__ = [
    "CHARACTERS",
    "SCHEDULE",
    "STEPS",
    "WORDS",
    "Definition",
    "Kept",
    "Problem",
    "Step",
    "answer",
    "check",
    "extract_answer",
    "kept",
    "kept_metrics",
    "lesson",
    "minimal_tokens",
    "minimal_trace",
    "needed",
    "operand_values",
    "parse_prompt",
    "pieces",
    "plan",
    "prompt",
    "sample_problem",
    "token_count",
    "trace",
    "unknown",
    "values",
]

MODULUS = 53
REGISTERS = "abcdefgh"
CONSTANTS = 2  # registers that are given; the others are operations
FEWEST_NEEDED, MOST_NEEDED = 2, 5  # operations
NUMBERS = range(2, MODULUS)
PRODUCT_SHARE = 0.4  # of the operations; the others are sums and differences alike
UNKNOWN_SHARE = 0.2  # of the products that prompts ask for
KNOWN_PAIRS_SHARE = 0.12  # of all pairs

WORDS: tuple[str, ...] = (*(f"{residue:02d}" for residue in range(MODULUS)), *(f"{name}=" for name in REGISTERS))
CHARACTERS = "abcdefgh+-*=:;?\n"

SCHEDULE, STEPS = 3600, 2200
SMALL = 700  # of these steps are on small problems, see `lesson`

_OPERATIONS = {"+": add, "-": sub, "*": mul}
_DEFINITION = re.compile(r"([a-h])=(?:(\d\d)|([a-h]|\d\d)([-+*])([a-h]));")
_PROMPT = re.compile(rf"(?:{_DEFINITION.pattern})+(?P<query>[a-h])\?")
_STEP = re.compile(
    r"(?P<register>[a-h])=[a-h]?\d\d[-+*][a-h]\d\d(?::\d\d)?=(?P=register)(?P<first>\d\d)"
    r"(?:\?[\d+:]*=(?P=register)(?P<checked>\d\d))?;"
)
_TOKEN = re.compile("|".join((*MARKERS, r"\d\d", f"[{REGISTERS}]=", ".")), re.DOTALL)


class Definition(NamedTuple):
    """A register in a prompt: `c=a*b` is ("c", "a", "*", "b"), `e=08-c` is ("e", "08", "-", "c").

    Without operator it is a constant: `a=17` is ("a", "17").
    """

    register: str
    left: str
    operator: str = ""
    right: str = ""

    @property
    def operands(self) -> tuple[str, ...]:
        """The registers that it is made of."""
        return tuple(operand for operand in (self.left, self.right) if operand.isalpha())


class Problem(NamedTuple):
    """The definitions in the order of the prompt, and the register that it asks for."""

    definitions: tuple[Definition, ...]
    query: str


class Step(NamedTuple):
    """A step as a completion wrote it.

    Attributes:
        needed: the query needs its register, which no step before worked out.
        product: it is one.
        unknown: it is a product of an unknown pair.
        checked: a check follows its first value.
        fast: its first value is right.
        right: its last value is; without a check this is the first.
    """

    needed: bool
    product: bool
    unknown: bool
    checked: bool
    fast: bool
    right: bool


class Kept(NamedTuple):
    """What a completion works out.

    Attributes:
        steps: its steps, in order.
        due: how many the query needs.
    """

    steps: tuple[Step, ...]
    due: int


# --- problems ---


def sample_problem(rng: random.Random) -> Problem:
    """Two constants and six operations, K of which the query needs; K is uniform on 2..5.

    A product is of a number from 2 to 52 and a register that is defined before. A sum or difference is of such a
    register and, each half of the time, a constant or a number. Of the products UNKNOWN_SHARE are of unknown pairs.

    The operations that the query needs are a chain: each takes the one before, and the query is the last. Of the others
    none is made of the query, so a completion can come to each of them before it ends.
    """
    names = rng.sample(REGISTERS, len(REGISTERS))
    count = rng.randint(FEWEST_NEEDED, MOST_NEEDED)
    definitions = [Definition(name, f"{rng.choice(NUMBERS):02d}") for name in names[:CONSTANTS]]
    known = {name: int(number) for name, number, _, _ in definitions}
    query = names[CONSTANTS + count - 1]
    for i, name in enumerate(names[CONSTANTS:]):
        before = [register for register in known if register != query]
        chained = 0 < i < count
        operand = before[-1] if chained else rng.choice(before)
        definitions.append(_operation(name, operand, known, names[:CONSTANTS], rng))
        known[name] = _value(definitions[-1], known)
    rng.shuffle(definitions)
    return Problem(tuple(definitions), query)


def _operation(
    name: str, operand: str, known: Mapping[str, int], constants: list[str], rng: random.Random
) -> Definition:
    if rng.random() < PRODUCT_SHARE:
        factors = _factors(known[operand], rng.random() < UNKNOWN_SHARE)
        return Definition(name, f"{rng.choice(factors):02d}", "*", operand)
    operator = rng.choice("+-")
    if rng.random() < 0.5:
        return Definition(name, f"{rng.choice(NUMBERS):02d}", operator, operand)
    other = rng.choice([register for register in constants if register != operand])
    left, right = rng.sample((operand, other), 2)
    return Definition(name, left, operator, right)


@cache
def _factors(value: int, is_unknown: bool) -> list[int]:
    """The numbers that make an unknown pair with a value, or a known one; there are some for every value."""
    return [number for number in NUMBERS if unknown(value, number) is is_unknown]


def prompt(problem: Problem) -> str:
    definitions = (f"{name}={left}{operator}{right};" for name, left, operator, right in problem.definitions)
    return "".join(definitions) + f"{problem.query}?"


def parse_prompt(text: str) -> Problem:
    """The problem of a prompt.

    Raises:
        ValueError: `text` is not of the form `a=17;c=08*a;c?`, or defines a register twice, by itself or not at all.
    """
    match = _PROMPT.fullmatch(text)
    if match is None:
        raise ValueError(f"prompt: {text!r} must be definitions and a query such as 'a=17;c=08*a;c?'.")
    definitions = tuple(
        Definition(name, constant or left, operator, right)
        for name, constant, left, operator, right in _DEFINITION.findall(text)
    )
    names = [definition.register for definition in definitions]
    if len(set(names)) < len(names) or match["query"] not in names:
        raise ValueError(f"prompt: {text!r} must define each register once, and the one it asks for.")
    problem = Problem(definitions, match["query"])
    _in_order(problem)
    return problem


def _in_order(problem: Problem) -> list[Definition]:
    """The definitions, each after those of its operands.

    Raises:
        ValueError: there is no such order.
    """
    found: dict[str, Definition] = {}
    while len(found) < len(problem.definitions):
        ready = [d for d in problem.definitions if d.register not in found and found.keys() >= set(d.operands)]
        if not ready:
            raise ValueError(f"prompt: {prompt(problem)!r} must define no register by itself or by one that it lacks.")
        found |= {definition.register: definition for definition in ready}
    return list(found.values())


def values(problem: Problem) -> dict[str, int]:
    """What each register is."""
    found: dict[str, int] = {}
    for definition in _in_order(problem):
        found[definition.register] = _value(definition, found)
    return found


def _value(definition: Definition, known: Mapping[str, int]) -> int:
    """What a register is by its definition, where its operands have the values `known`."""
    left, right = operand_values(definition, known)
    return _OPERATIONS[definition.operator](left, right) % MODULUS if definition.operator else left


def operand_values(definition: Definition, known: Mapping[str, int]) -> tuple[int, int]:
    """The values of both operands; a constant is its own first, and has no second, which is 0 here."""
    left, right = (known[text] if text.isalpha() else int(text or 0) for text in (definition.left, definition.right))
    return left, right


def needed(problem: Problem) -> list[Definition]:
    """The operations that the query can't be worked out without, each after those of its operands."""
    wanted = {problem.query}
    found = []
    for definition in reversed(_in_order(problem)):
        if definition.register in wanted and definition.operator:
            wanted |= set(definition.operands)
            found.append(definition)
    return found[::-1]


def answer(problem: Problem) -> str:
    return f"{values(problem)[problem.query]:02d}"


@cache
def unknown(a: int, b: int) -> bool:
    """Whether the model never learns a*b as a fast product: all but KNOWN_PAIRS_SHARE of the pairs, in either order.

    A hash decides, so that the pairs are the same for every seed and follow no rule that can be learned.
    """
    digest = hashlib.sha256(f"{min(a, b)}*{max(a, b)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >= KNOWN_PAIRS_SHARE * 2**32


# --- completions ---


def check(a: int, b: int) -> str:
    """The work of a*b: `check(39, 36)` is "?04+22:24", for 39*30, 39*6, 4+20. The product, 24+2, comes after it."""
    tens, units = a * (b - b % 10) % MODULUS, a * (b % 10) % MODULUS
    return f"?{tens:02d}+{units:02d}{_halfway(tens, '+', units)}"


def _halfway(a: int, operator: str, b: int) -> str:
    """The work of an easy step: 17+42 gives ":04", which is 17+40."""
    return f":{_OPERATIONS[operator](a, b - b % 10) % MODULUS:02d}"


def plan(steps: list[Definition]) -> str:
    """The registers of steps from the query back: "gfedc;". Each is one that the one before it is made of."""
    return "".join(step.register for step in reversed(steps)) + ";"


def pieces(
    problem: Problem, rng: random.Random, checked: float = 0.5, slip: float = 0.75, unneeded: float = 0.3
) -> list[tuple[str, bool]]:
    """A completion in pieces, without EOS, each with whether training has a loss on it.

    There is none on the fast values of unknown pairs. Some of these are wrong, and then a check follows: so the model
    learns that the check counts. Where a check is has nothing to do with what is unknown: a model that is trained on
    such traces has yet to find out where checks pay.

    Args:
        problem: the problem.
        checked: the probability that a product is checked.
        slip: the probability that the fast value of an unknown pair is wrong, if it is checked.
        unneeded: the probability that a step which the query doesn't need comes before one that it needs.
    """
    known = values(problem)
    needed_steps = needed(problem)
    spare = [d for d in _in_order(problem) if d.operator and d not in needed_steps]
    done = {definition.register for definition in problem.definitions if not definition.operator}
    found = [(THINK + plan(needed_steps), True)]
    for definition in needed_steps:
        ready = [d for d in spare if done >= set(d.operands)]
        due = [definition]
        if ready and rng.random() < unneeded:
            due.insert(0, rng.choice(ready))
            spare.remove(due[0])
        for step in due:
            found += _step(step, known, rng, checked, slip)
            done.add(step.register)
    return [*found, (f"{PROBE}{answer(problem)}{ANSWER_END}", True)]


def _step(
    definition: Definition, known: Mapping[str, int], rng: random.Random, checked: float, slip: float
) -> list[tuple[str, bool]]:
    name, left, operator, right = definition
    a, b = operand_values(definition, known)
    value = known[name]
    begin = f"{name}={left if left.isalpha() else ''}{a:02d}{operator}{right}{b:02d}"
    if operator != "*":
        return [(f"{begin}{_halfway(a, operator, b)}={name}{value:02d};", True)]
    is_checked = rng.random() < checked
    slips = is_checked and unknown(a, b) and rng.random() < slip
    fast = (value + rng.randrange(1, MODULUS)) % MODULUS if slips else value
    end = f"{check(a, b)}={name}{value:02d};" if is_checked else ";"
    return [(f"{begin}={name}", True), (f"{fast:02d}", not unknown(a, b)), (end, True)]


def trace(problem: Problem, rng: random.Random, checked: float = 0.5, slip: float = 0.75, unneeded: float = 0.3) -> str:
    """A completion, without EOS; see `pieces`."""
    return "".join(text for text, _ in pieces(problem, rng, checked, slip, unneeded))


def lesson(rng: random.Random, step: int) -> tuple[Problem, list[tuple[str, bool]]]:
    """What a step of training learns from: a problem and a completion in `pieces`.

    The first SMALL steps are on problems of two operations, both needed. There a look-up has three definitions to
    choose from in place of eight. Without them one look-up or another was still missing when three runs were stopped,
    after 1,200 to 1,600 steps.
    """
    problem = sample_problem(rng)
    if step < SMALL:
        while len(needed(problem)) > FEWEST_NEEDED:
            problem = sample_problem(rng)
        steps = needed(problem)
        kept_registers = {name for step in steps for name in (step.register, *step.operands)}
        problem = Problem(tuple(d for d in problem.definitions if d.register in kept_registers), problem.query)
    return problem, pieces(problem, rng)


def minimal_trace(problem: Problem) -> str:
    """The shortest completion of this form with the right answer: the steps that are needed, and no check."""
    return trace(problem, random.Random(0), checked=0, unneeded=0)  # where nothing is left to chance


def token_count(text: str) -> int:
    """How many tokens a text of this form has."""
    return len(_TOKEN.findall(text))


def minimal_tokens(problem: Problem) -> int:
    """Tokens of `minimal_trace` and EOS."""
    return token_count(minimal_trace(problem)) + 1


# --- what a completion keeps ---


def kept(problem: Problem, completion: str) -> Kept:
    """Which steps a completion works out, which of them are checked, and which are right.

    A step is judged by the definition of its register and the values that the completion gave the operands before,
    right or wrong, so a mistake counts once. An operand that it has not worked out has its true value. A miscopied
    operand makes the value wrong.

    A completion of any form is taken; what doesn't look like a step is left out.
    """
    definitions = {definition.register: definition for definition in problem.definitions}
    due = {definition.register for definition in needed(problem)}
    found, missing, known = [], set(due), values(problem)
    for match in _STEP.finditer(completion):
        name, checked = match["register"], match["checked"]
        if name not in definitions:
            continue
        definition = definitions[name]
        value, product = _value(definition, known), definition.operator == "*"
        known[name] = int(checked or match["first"])
        found.append(
            Step(
                needed=name in missing,
                product=product,
                unknown=product and unknown(*operand_values(definition, known)),
                checked=checked is not None,
                fast=int(match["first"]) == value,
                right=known[name] == value,
            )
        )
        missing.discard(name)
    return Kept(tuple(found), len(due))


def kept_metrics(completions: Iterable[Kept]) -> dict[str, float]:
    """Shares over the steps of all completions, and a mean per completion.

        needed               share of the steps that are due which are there
        unneeded             steps that are not needed, per completion
        checked/KIND         share of the needed products of a kind that are checked
        checked/unneeded     the same of products that are not needed
        right/easy           share of the easy steps that are right
        right/fast/KIND      share of the products of a kind whose first value is right, checked or not
        right/checked/KIND   share of the checked products of a kind whose last value is right

    KIND is unknown, where a check pays, or known. A share of no step is left out; without completions there is nothing.
    """
    completions = list(completions)
    if not completions:
        return {}
    steps = [step for completion in completions for step in completion.steps]
    products = [step for step in steps if step.product]
    metrics = {"unneeded": sum(not step.needed for step in steps) / len(completions)}
    due = sum(completion.due for completion in completions)
    if due:
        metrics["needed"] = sum(step.needed for step in steps) / due
    shares = {
        "checked/unneeded": [step.checked for step in products if not step.needed],
        "right/easy": [step.right for step in steps if not step.product],
    }
    for kind, is_unknown in (("unknown", True), ("known", False)):
        of_kind = [step for step in products if step.unknown is is_unknown]
        shares[f"checked/{kind}"] = [step.checked for step in of_kind if step.needed]
        shares[f"right/fast/{kind}"] = [step.fast for step in of_kind]
        shares[f"right/checked/{kind}"] = [step.right for step in of_kind if step.checked]
    return metrics | {name: fmean(share) for name, share in shares.items() if share}
