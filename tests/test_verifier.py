"""The verifier: equal numbers, equivalent answers, hostile answers, and the workers that it starts."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from iapo.reward import compute_score
from iapo.tasks import verifier
from iapo.tasks.reference import references
from iapo.tasks.verifier import plain_number, same_number, verdict

HOSTILE = "9^{9^{9^{9}}}"


def judge(answer: str, gold: str, timeout_s: float = 20.0) -> str:
    return asyncio.run(verdict(answer, gold, timeout_s))


def output_of(program: str) -> str:
    return subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60)


def worker_pids() -> set[int]:
    """Spawned children of this process, without Python's resource tracker, which lives as long as it does."""
    pids = set()
    for child in psutil.Process().children(recursive=True):
        # A child may end meanwhile, and other tests' processes may be zombies, which have no command line.
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                pids.add(child.pid)
    return pids


@pytest.fixture(scope="module", autouse=True)
def no_process_left_behind():
    yield
    verifier.close_pool()
    assert worker_pids() == set()


def test_plain_numbers():
    assert plain_number("1,234,567.50") == plain_number("1234567.5")
    for text in ("$18", "\\$18", "18 dollars", "$18.", "$18$", "18.00", "+18", "\\(18\\)", "\\boxed{18}", "= 18"):
        assert plain_number(text) == 18, text
    for text in ("", ".", "$", "1,00", "1e", "1/2", "18%", "2 million", "2 pi", "5 or six", "x18", "9**9"):
        assert plain_number(text) is None, text
    assert plain_number("\N{ARABIC-INDIC DIGIT ONE}") is None


@pytest.mark.parametrize(
    "text",
    [
        *("5 cm", "5cm", "5\\text{ cm}", "5\\,\\mathrm{cm}", "5~\\text{cm}", "\\text{5 cm}", "$5$ cm", "\\(5\\) cm"),
        *("$5", "\\$5", "5\\$", "5 USD", "€5", "5¢", "5 eggs", "5 people", "5 boxes", "5 candies", "5 m", "5m", "5 L"),
        *("5 cm^2", "5\\text{ cm}^2", "5 square feet", "5 sq. ft.", "5 km/h", "5 miles per hour", "5 KG", "5 oz."),
    ],
)
def test_one_list_of_units_in_every_form(text):
    assert plain_number(text) == 5
    assert (judge(text, "5"), judge(text, "6")) == ("right", "wrong")


@pytest.mark.parametrize(
    "text",
    [
        *("5%", "5\\%", "5 percent", "5 per cent", "5^\\circ", "5°", "5 degrees", "5 million", "5 millions", "5 dozen"),
        *("5 hundred", "5 thousands", "5 billion", "5 trillion", "5 lakh", "5 score", "5 pairs", "5k", "5M", "5 tens"),
        *(
            "5 thirds",
            "5 halves",
            "5 half",
            "5 quarters",
            "5 fifths",
            "5 tenths",
            "5 squared",
            "5 cubed",
            "5 factorial",
        ),
        *(
            "5abc",
            "5sin",
            "5log",
            "5 log",
            "5 and",
            "5 times",
            "5 mod",
            "5th",
            "5 am",
            "5 wombats",
            "5 million dollars",
        ),
    ],
)
@pytest.mark.parametrize("form", ["{}", "\\({}\\)"])
def test_what_is_no_unit(text, form):
    assert plain_number(form.format(text)) is None


@pytest.mark.parametrize(("form", "same"), [("{} minutes", "{} min"), ("{}\\text{{ cm}}", "{} centimeters")])
@pytest.mark.parametrize("number", ["60", "1/2", "\\frac{{1}}{{2}}", "1e3"])
def test_two_units_must_agree(number, form, same):
    first, second = form.format(number), same.format(number)
    assert judge(first, second) == judge(second, first) == judge(first, number) == judge(number, first) == "right"
    assert judge(first, f"{number} seconds") == judge(f"{number} kg", second) == "wrong"


@pytest.mark.parametrize("gold,answer", [("ABC", "ACB"), ("AB", "BA"), ("HTT", "TTH"), ("VI", "IV")])
def test_capitals_are_no_products(gold, answer):
    assert judge(gold, answer) == judge(answer, gold) == "wrong"
    assert judge(gold, gold) == judge(gold, f"\\text{{{gold}}}") == "right"


def test_powers_and_rates_of_units():
    assert judge("5 sq cm", "5 square centimeters") == judge("5 sq cm", "5 cm^2") == "right"
    assert judge("5 sq cm", "5 cubic cm") == judge("5 cm^3", "5 sq cm") == "wrong"
    assert judge("5 miles per hour", "5 mph") == judge("5 mi/h", "5 miles per hour") == "right"
    assert judge("5 miles per hour", "5 miles per minute") == judge("5 mph", "5 hours per mile") == "wrong"


def test_a_letter_of_the_ground_truth_may_be_a_variable():
    assert judge("5m", "5") == judge("5m", "5 m") == judge("5m", "m \\cdot 5") == "right"
    assert judge("5", "5m") == judge("5", "5m^2") == judge("x", "x m") == judge("x + 1", "(x + 1) m") == "wrong"


def test_a_number_in_a_base():
    """Digits and base are compared; without a base it is 10. The same value in another base is another answer."""
    for same in ("42_{9}", "(42)_9", "042_9", "42_{(9)}", "42_{\\text{base }9}", "42 (base 9)", "42 base 9", "42_9 m"):
        assert judge(same, "42_9") == judge("42_9", same) == "right", same
    for other in ("42_7", "42", "38", "38_{10}", "24_9", "-42_9", "x^2", "42_9 + 1"):
        assert judge(other, "42_9") == "wrong", other
    assert judge("42_{10}", "42") == judge("1a_{16}", "1A_{16}") == "right"
    assert judge("42_9", "42") == judge("1_000", "1") == judge("10_8", "8") == "wrong"
    assert judge("5_{max}", "5") == "unparsable"
    assert plain_number("42_9") is None and plain_number("42_{10}") == 42


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1/3", "0.\\overline{3}"),
        ("0.1\\overline{6}", "\\frac16"),
        ("-2.\\bar{45}", "-27/11"),
        ("0.\\overline{9}", "1"),
    ],
)
def test_repeating_decimals_are_fractions(answer, gold):
    assert judge(answer, gold) == "right"
    assert judge(answer, "0.\\overline{31}") == "wrong"


def test_same_number():
    assert same_number("-0.50", "-.5") is True
    assert same_number("0.3", "0.30000000000000004") is False
    assert same_number("60 minutes", "60 seconds") is False
    assert same_number("18", "18\\%") is None
    assert same_number("9" * 1000, "9" * 999 + "8") is False


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *(("1e16", "10000000000000000"), ("0.000025", "2.5e-05"), ("1E3", "1000"), ("1.5\\times 10^{3}", "1500")),
        *(("1.5 x 10^3", "1500"), ("2.5 \\cdot 10^{-5}", "0.000025"), ("1e400", "10^{400}"), ("1e3 + 1", "1001")),
        *(("1 000", "1000"), ("1\\,000", "1000"), ("1{,}000", "1000"), ("1,\\!000", "1000"), ("1_000", "1000")),
        *(("2 1/2", "2.5"), ("5(6)", "30"), ("-5", "\N{MINUS SIGN}5"), ("30°", "30^\\circ"), ("5 per cent", "0.05")),
    ],
)
def test_numbers_that_are_read(answer, gold):
    assert judge(answer, gold) == "right"


def test_exponents_are_exact():
    assert same_number("123456789012345678901234567890e10", "1234567890123456789012345678900000000000") is True
    assert same_number("1e9999", "1e9998") is False
    assert plain_number("1e99999") is None  # a number that long is no answer


@pytest.mark.parametrize(
    ("answer", "gold"), [("1,000", "1000"), ("$18", "18"), ("18 dollars.", "18"), ("\\text{Ann}", "\\text{Ann}")]
)
def test_right_without_a_worker(answer, gold):
    before = worker_pids()
    assert judge(answer, gold) == "right"
    assert judge("41", "42") == "wrong"
    assert worker_pids() <= before


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1/2", "0.5"),
        ("0.5", "\\frac{1}{2}"),
        ("\\frac12", "1/2"),
        ("$\\frac{1}{2}$", "0.5"),
        ("\\boxed{1/2}", "0.5"),
        ("5 km", "5"),
        ("18\\text{ dollars}", "18"),
        ("50\\%", "0.5"),
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("\\{3, 2, 1\\}", "\\{1, 2, 3\\}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("\\(\\log_2 8\\)", "\\log_2 8"),
        *(
            ("3", "\\log_2 8"),
            ("\\frac 1 2", "0.5"),
            ("12", "12\\text{ ways}"),
            ("$0.\\overline{3}$", "0.\\overline{3}"),
        ),
        *(("x = 2 + 3 = 5", "5"), ("f(x) = 2 \\cdot x = 2x", "2x"), ("\\text{Total} = 18", "18"), ("zyx", "xyz")),
        *(
            ("x = 1 \\text{ and } x = 2", "1,2"),
            ("x=2 or x=1", "1,2"),
            ("\\operatorname{lcm}(2,3)", "6"),
            ("0 eggs", "0"),
        ),
        *(
            ("\\boxed{1}, \\boxed{2}", "2,1"),
            ("\\begin{bmatrix} 2/4 \\end{bmatrix}", "\\begin{pmatrix} 1/2 \\end{pmatrix}"),
        ),
        ("x = 5", "5"),
    ],
)
def test_equivalent_answers(answer, gold):
    assert judge(answer, gold) == "right"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("2\\sqrt{3}", "2"),
        ("2 million", "2"),
        ("5 or 6", "5"),
        ("0.3333", "1/3"),
        ("(1,3)", "(1,2)"),
        ("\\frac{1}{0}", "5"),
        *(("6abc", "6"), ("2 thirds", "2"), ("2 thirds", "2/3"), ("3 halves", "3"), ("5 millions", "5"), ("2sin", "2")),
        *(("5\\text{ million}", "5"), ("5\\text{ thirds}", "5"), ("6\\text{abc}", "6"), ("\\(5\\) million", "5")),
        *(("0xFF", "0xA"), ("0xFF", "0"), ("0b11", "0"), ("0xA", "10"), ("1 000", "0"), ("2 1/2", "3/2")),
        *(
            ("5\\%", "5"),
            ("5\\text{ percent}", "5"),
            ("5 per cent", "5"),
            ("5 log", "5"),
            ("5th", "5"),
            ("5 more", "5"),
        ),
        *(("\\text{silent}", "\\text{listen}"), ("silent", "listen"), ("5 or 6 cm", "5 cm"), ("$5", "5 cents")),
        *(("It is not 5.", "5"), ("\\boxed{2} thirds", "2"), ("\\boxed{4} \\boxed{5}", "5"), ("between 4 and 5.", "5")),
    ],
)
def test_wrong_answers_are_no_failures(answer, gold):
    assert judge(answer, gold) == "wrong"


REFERENCES = [
    *("7", "-4", "0.35", ".0081", "12,500", "1,\\!024", "1,\\! 234,\\! 567", "10^{20}", "0.\\overline{27}"),
    *("\\frac{5}{12}", "-\\frac{7}{3}", "\\frac 38", "\\frac9{14}", "\\dfrac{11}{20}", "3 \\frac{1}{4}", "1/6"),
    *("\\sqrt{15}", "4 \\sqrt{7}", "\\frac{2\\sqrt{3}}{5}", "9 - 2\\sqrt{5}", "\\sqrt[3]{4}", "15\\pi", "24 + 3\\pi"),
    *(
        "4 - 7i",
        "2 \\pm \\sqrt{11}",
        "\\pi",
        "e",
        "\\cot \\theta",
        "\\log_2 5",
        "(x + 3)(y - 1)",
        "6x^2 - x + 8",
        "3ab",
    ),
    *("(4,-9)", "\\left( 2, \\frac{\\pi}{3} \\right)", "(1,0,-5)", "3, 8, 13", "\\{1 \\pm \\sqrt{2}, 4\\}"),
    *("[-3,5)", "(-\\infty, -1] \\cup (4, \\infty)", "\\left[ \\frac{1}{4}, 2 \\right]", "x \\in (0,8]"),
    *("x = 9", "y = 4x - 1", "2x - 3y + z = 0", "x \\le 6", "\\emptyset"),
    *("\\begin{pmatrix} 3 & -1 \\\\ 0 & 2 \\end{pmatrix}", "\\begin{pmatrix} 1/2 \\\\ -3 \\end{pmatrix}"),
    *("\\text{Marcus}", "\\text{(D)}", "\\text{odd}", "\\text{no solution}", "hyperbola", "\\text{Yes}"),
    *("314_5", "1011_{2}", "3C_{16}", "35\\%", "140^\\circ", "\\frac{90}{7}^{\\circ}"),
    *("\\$24.50", "\\$1,\\!250", "48\\text{ cm}^2", "3.6 \\text{ cents}", "55 \\text{ miles per hour}"),
]
WRAPPERS = [
    *("{}", "{}.", "\\boxed{{{}}}", "\\boxed{{{}}}.", "\\boxed{{{}.}}", "${}$", "${}$.", "${}.$", "$${}$$", "$${}$$."),
    *("\\[{}\\]", "\\[{}\\].", "\\[{}.\\]", "\\[\n  {}\n\\]", "\\({}\\)", "\\({}\\).", "\\({}.\\)", "$\\boxed{{{}}}$."),
    *(
        "\\[\\boxed{{{}}}\\]",
        "\\[ \\boxed{{{}}}. \\]",
        "**{}**",
        "**{}**.",
        "**{}.**",
        "**${}$**",
        "__{}__",
        "\n {} \n",
    ),
    *("Answer: {}", "Answer: {}.", "Answer: ${}$", "**Answer:** {}", "**Answer**: \\({}\\)", "**Answer: {}**"),
    *("Final answer: $\\boxed{{{}}}$", "The answer is {}.", "The answer is ${}$.", "The answer is **{}**."),
    *("So, the final answer is: \\[\\boxed{{{}}}\\]", "$\\displaystyle {}$", "= {}"),
]
WITH_UNIT = [
    *("{} cm", "{}\\text{{ cm}}", "{} \\text{{ units}}", "${}$ apples", "{} dollars.", "{}\\,\\mathrm{{cm}}"),
    *("\\boxed{{{}}} cm", "\\boxed{{{}\\text{{ cm}}^2}}", "**{}** hours", "The answer is {} hours.", "${}", "\\${}"),
    *("$\\${}$", "€{}", "**${}**", "\\boxed{{\\${}}}", "The answer is ${}."),
]


def sized(text: str) -> str:
    """With \\left and \\right at every bracket."""
    text = re.sub(r"\\(?:left|right)(?![a-z])\s*", "", text)
    return re.sub(r"(?<!\\)[)\]]", r"\\right\g<0>", re.sub(r"(?<!\\)[(\[]", r"\\left\g<0>", text))


WITHOUT_UNIT = re.compile(r"\\text|\\mbox|_\{?\d+\}?$|\\circ|%|\\\$|^[a-z]{4}|emptyset|\\in |\\le ")


def forms(reference: str) -> list[str]:
    """All forms in which a reference answer is right; those with a unit only for a value that has none."""
    wrappers = WRAPPERS + ([] if WITHOUT_UNIT.search(reference) else WITH_UNIT)
    spellings = {
        reference.replace("\\dfrac", "\\frac"),
        re.sub(r"\\d?frac", r"\\dfrac", reference),
        sized(reference),
        reference.replace(" ", ""),
    }
    return [form.format(reference) for form in wrappers] + [
        form.format(spelling) for spelling in sorted(spellings) for form in ("{}", "${}$.", "\\boxed{{{}}}")
    ]


@pytest.mark.parametrize("reference", REFERENCES)
def test_every_form_of_a_reference_is_right(reference):
    verdicts = {answer: judge(answer, reference) for answer in forms(reference)}
    assert {answer: found for answer, found in verdicts.items() if found != "right"} == {}


NEAR_MISSES = [
    *(("52_9", "52_8"), ("52", "52_8"), ("42", "52_8"), ("52_8", "52"), ("1011_3", "1011_2")),
    *(("(0,1]", "[0,1)"), ("[0,1]", "[0,1)"), ("(0,1)", "[0,1]"), ("(1,0)", "(0,1)"), ("(3,1)", "(2,1)")),
    *(("(-\\infty,2]", "(-\\infty,2)"), ("(2,\\infty)", "(-\\infty,2)"), ("x < 6", "x \\le 6"), ("(1,2)", "(2,1)")),
    *(("(1,2,3)", "(2,1,3)"), ("2,1", "(1,2)"), ("[1,2]", "\\{1,2\\}"), ("(1,2) \\cap (3,4)", "(1,2) \\cup (3,4)")),
    *(("0.333", "1/3"), ("0.33", "\\frac{1}{3}"), ("3.14", "\\pi"), ("1.41", "\\sqrt{2}"), ("0.28", "\\frac{2}{7}")),
    *(("10", "10\\%"), ("10\\%", "10"), ("\\boxed{10}\\%", "10"), ("0.01", "10\\%"), ("141^\\circ", "140^\\circ")),
    *(("58", "58,500"), ("10", "10,\\!080"), ("137", "137 \\frac{1}{2}"), ("1", "1,-2"), ("2", "2\\sqrt{3}")),
    *(("x", "x=5"), ("2k", "2k+2"), ("6+9", "6+9i"), ("(-\\infty,2)", "(-\\infty,2) \\cup (3,\\infty)"), ("p", "p-q")),
    *(("\\text{Eve}", "\\text{Evelyn}"), ("E", "\\text{Evelyn}"), ("A", "\\text{(B)}"), ("even", "\\text{odd}")),
    *(("1+\\sqrt{19}", "1 \\pm \\sqrt{19}"), ("1-\\sqrt{19}", "1 \\pm \\sqrt{19}"), ("-3", "3"), ("x^2+1", "x^2-1")),
    *(("5 or 6", "5"), ("5 or 6", "6"), ("5, 6", "5"), ("5 and 6", "6"), ("$5$ or $6$", "5"), ("Answer: 5, 6", "6")),
    *(("\\boxed{5} or \\boxed{6}", "5"), ("\\boxed{4} \\boxed{5}", "20"), ("\\boxed{4}\\boxed{5}", "45"), ("5 5", "5")),
    *(("**5** **6**", "6"), ("$4$ $5$", "20"), ("5\n6", "6"), ("The answer is 5. The answer is 6.", "5")),
    *(
        ("The answer is 5. The answer is 6.", "6"),
        ("Answer: 5 Answer: 6", "6"),
        ("x = 5 or 6", "5"),
        ("5 or 6 cm", "6"),
    ),
    *(("1 hour", "60 minutes"), ("60", "1 hour"), ("\\$0.054", "5.4 \\text{ cents}"), ("15 cm", "15\\mbox{ cm}^2")),
    *(("The answer is not 5.", "5"), ("not 5", "5"), ("Answer: 5 wombats", "5"), ("**5** million", "5")),
    *(("1 1/2", "11/2"), ("\\frac1 23", "\\frac12 3"), ("**2**3", "23"), ("2**3", "23"), ("\\boxed{2} 5", "25")),
    *(("\\begin{pmatrix} 1 & 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"), ("3:2", "2:3")),
    *(
        ("[15,-29]", "(15,-29)"),
        ("[6,31,-1]", "(6,31,-1)"),
        ("(2,\\infty]", "(2,\\infty)"),
        ("[-\\infty,0]", "(-\\infty,0]"),
    ),
    *(
        ("not 0", "0"),
        ("0 wombats", "0"),
        ("0\\text{ million}", "0"),
        ("x = 0 wombats", "x = 0"),
        ("Answer: no 5", "5"),
    ),
    *(
        ("\\frac{3}{56}_7", "\\frac{3}{56}"),
        ("2\\sqrt{3}_8", "2\\sqrt{3}"),
        ("4210_{5", "4210_5"),
        ("\\text{Eve", "\\text{Eve}"),
    ),
    *(("x=4 x=5", "5"), ("x=4 x=5", "x=5"), ("y = 3x y = -2x", "y = -2x"), ("x = \\frac{1}{2} \\quad x = 3", "3")),
]


@pytest.mark.parametrize(("answer", "gold"), NEAR_MISSES)
def test_near_misses_stay_wrong(answer, gold):
    for form in ("{}", "\\boxed{{{}}}", "${}$.", "**{}**", "Answer: {}"):
        assert judge(form.format(answer), gold) in ("wrong", "unparsable"), form


PAGE = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    re.findall(r"^\| `(.+?)` \| `(.+?)` \| (right|wrong|unparsable)\b", PAGE, re.MULTILINE),
)
def test_the_tables_of_the_page_on_rewards(answer, gold, expected):
    assert judge(answer, gold) == expected


def real_references() -> dict[str, list[str]]:
    """The reference answers of GSM8K, MATH-500 and SVAMP in the folder that IAPO_REAL_DATA names."""

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (Path(os.environ["IAPO_REAL_DATA"]) / name).read_text().splitlines()]

    gsm8k = rows("gsm8k/train.jsonl") + rows("gsm8k/test.jsonl")
    return {
        "math500": [row["answer"] for row in rows("math500/test.jsonl")],
        "gsm8k": [row["answer"].rpartition("####")[2].strip() for row in gsm8k],
        "svamp": [text for row in rows("svamp/all.jsonl") for text in references(row["Answer"])],
    }


def judge_all(pairs: list[tuple[str, str]]) -> list[str]:
    async def run():
        return await asyncio.gather(*[verdict(answer, gold, 20.0) for answer, gold in pairs])

    return asyncio.run(run())


real = pytest.mark.skipif("IAPO_REAL_DATA" not in os.environ, reason="IAPO_REAL_DATA names no folder of real data sets")


@pytest.mark.real
@real
@pytest.mark.parametrize("name", ["math500", "gsm8k", "svamp"])
def test_every_form_of_every_real_reference_is_right(name):
    """With -s it prints the counts."""
    found = real_references()[name]
    pairs = [(answer, gold) for gold in sorted(set(found)) for answer in forms(gold)]
    wrong = [pair for pair, said in zip(pairs, judge_all(pairs), strict=True) if said != "right"]
    asked = Counter(gold for _, gold in pairs)
    print(f"\n{name}: {len(found)} references in {sum(asked[gold] for gold in found)} forms, {len(wrong)} wrong")
    assert wrong == []


def near(reference: str) -> list[str]:
    """Near misses of any reference: two answers, another base, words, another digit."""
    two = (f"{reference} or 7777", f"7777 and {reference}", f"\\boxed{{{reference}}} \\boxed{{7777}}")
    words = (f"{reference} million", f"{reference} wombats", f"The answer is not {reference}.")
    digits = [
        reference[: digit.start()] + str((int(digit[0]) + 1) % 10) + reference[digit.end() :]
        for digit in re.finditer("[0-9]", reference)
    ]
    return [*two, *words, f"{reference}_7", f"{reference} + 1", *digits]


@pytest.mark.real
@real
@pytest.mark.parametrize("name", ["math500", "gsm8k", "svamp"])
def test_near_misses_of_real_references_stay_wrong(name):
    """For at most 350 distinct references of each set; with -s it prints the counts."""
    found = sorted(set(real_references()[name]))[:350]
    pairs = [(answer, gold) for gold in found for answer in near(gold)]
    right = [pair for pair, said in zip(pairs, judge_all(pairs), strict=True) if said not in ("wrong", "unparsable")]
    print(f"\n{name}: {len(pairs)} near misses of {len(found)} distinct references, {len(right)} not wrong")
    assert right == []


@pytest.mark.parametrize("answer", ["5\0", "\0", "9**9**9**9", "\\frac", "2 3", "5 & 5", "4 | 5", "$$", "4} \\boxed{5"])
def test_answers_that_are_no_expressions(answer):
    assert judge(answer, "5") == "unparsable"


@pytest.mark.parametrize("gold", ["", "\\frac", "1" * 1001, "2 3", "$$"])
def test_a_bad_ground_truth_is_an_error(gold):
    assert judge("x^2", gold).startswith("error: ground truth")


def test_the_reward_asks_the_workers():
    def score(answer):
        return asyncio.run(compute_score("any", f"<answer>{answer}</answer>", "0.5", timeout_s=20.0))

    assert [score(answer)["score"] for answer in ("1/2", "1/3")] == [0.5, -1.5]


@pytest.mark.parametrize("answer", [HOSTILE, "9999999!", "(" * 450 + "5" + ")" * 450])
def test_a_hostile_answer_is_killed_and_the_pool_still_works(answer):
    judge("1/2", "0.5")
    start = time.monotonic()
    assert judge(answer, "5", timeout_s=0.5) == "timeout"
    assert time.monotonic() - start < verifier.WALL_EXTRA_S  # killed for its CPU time, not by the clock
    assert judge("1/2", "0.5") == "right"


def spin(cpu_s: float) -> str:
    start = time.process_time()
    while time.process_time() - start < cpu_s:
        pass
    return "done"


def in_worker(function, argument, timeout_s):
    return asyncio.run(verifier.in_worker(function, [argument], timeout_s))


def test_the_limit_is_cpu_time():
    """An answer that waits four times the limit is judged; the same with work to do is not."""
    assert in_worker(time.sleep, 2.0, timeout_s=0.5) is None
    assert in_worker(spin, 2.0, timeout_s=0.5) == "timeout"


@pytest.fixture
def busy_core():
    """One core for this process, its workers and three others that never stop computing."""
    cores = os.sched_getaffinity(0)
    verifier.close_pool()
    os.sched_setaffinity(0, {min(cores)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    yield
    for other in others:
        other.kill()
        other.wait()
    verifier.close_pool()
    os.sched_setaffinity(0, cores)


@pytest.mark.skipif(sys.platform != "linux", reason="binding to a core is Linux's")
@pytest.mark.e2e
def test_the_verdicts_are_the_same_on_a_loaded_machine(monkeypatch, busy_core):
    """An answer that needs most of its CPU time takes longer than the limit by the clock, and is judged."""
    monkeypatch.setattr(verifier, "WORKERS", 1)
    judge("1/2", "0.5")
    start = time.monotonic()
    assert in_worker(spin, 0.6, timeout_s=1.0) == "done"
    assert time.monotonic() - start > 1.0
    answers = ("\\frac{2}{4}", "\\(0.5\\)", "1/3", "1/2 or 1/3", "\\frac", HOSTILE)
    verdicts = [judge(answer, "1/2", timeout_s=1.0) for answer in answers]
    assert verdicts == ["right", "right", "wrong", "wrong", "unparsable", "timeout"]


def test_the_limit_is_per_answer(monkeypatch):
    monkeypatch.setattr(verifier, "WORKERS", 1)
    verifier.close_pool()
    assert [in_worker(spin, 0.6, timeout_s=1.0) for _ in range(3)] == ["done"] * 3
    verifier.close_pool()


def test_a_far_larger_limit_by_the_clock(monkeypatch):
    assert verifier.WALL_FACTOR * 5.0 + verifier.WALL_EXTRA_S == 80.0  # of the default, 5 seconds of CPU time
    monkeypatch.setattr(verifier, "WALL_FACTOR", 1)
    monkeypatch.setattr(verifier, "WALL_EXTRA_S", 0.5)
    assert in_worker(time.sleep, 3600.0, timeout_s=0.5) == "timeout"
    assert judge("1/2", "0.5") == "right"


def test_concurrent_calls_are_not_hurt_by_a_hostile_one():
    """The two workers need longer for all 64 than one call's time-out: waiting must not count against it."""

    async def run():
        answers = [HOSTILE] + [f"\\frac{{{n}}}{{2}}" for n in range(1, 64)]
        return await asyncio.gather(*[verdict(answer, f"{n}/2", 3.0) for n, answer in enumerate(answers)])

    assert asyncio.run(run()) == ["timeout"] + ["right"] * 63


def test_waiting_for_a_worker_does_not_count():
    """Four answers run into the time-out on two workers; the fifth waits for twice its own time-out."""

    async def run():
        return await asyncio.gather(*[verdict(HOSTILE, "5", 1.0) for _ in range(4)], verdict("1/2", "0.5", 1.0))

    judge("1/2", "0.5")
    assert asyncio.run(run()) == ["timeout"] * 4 + ["right"]


def test_cancelling_frees_the_worker():
    async def run():
        calls = [asyncio.create_task(verdict(HOSTILE, "5", 300.0)) for _ in range(2)]
        await asyncio.sleep(0.5)
        for call in calls:
            call.cancel()
        return await asyncio.gather(*calls, return_exceptions=True)

    judge("1/2", "0.5")
    assert [type(outcome) for outcome in asyncio.run(run())] == [asyncio.CancelledError] * 2
    assert judge("1/2", "0.5") == "right"


def test_killed_workers_are_replaced():
    judge("1/2", "0.5")
    for pid in worker_pids():
        psutil.Process(pid).kill()
    time.sleep(0.5)
    assert judge("1/2", "0.5") == "right"


def test_workers_are_replaced_after_some_answers(monkeypatch):
    monkeypatch.setattr(verifier, "ANSWERS_PER_WORKER", 2)
    verifier.close_pool()
    judge("1/2", "0.5")
    first = worker_pids()
    assert [judge(f"{n}/2", f"\\frac{{{n}}}{{2}}") for n in range(6)] == ["right"] * 6
    assert not first & worker_pids()
    verifier.close_pool()


def test_a_worker_that_dies_at_work_is_an_error(monkeypatch):
    """With one worker only: a second one that still warms up would look busy too."""

    async def run():
        (worker,) = map(psutil.Process, worker_pids())
        start = worker.cpu_times().user
        call = asyncio.create_task(verdict(HOSTILE, "5", 60.0))
        while worker.cpu_times().user < start + 0.2:
            await asyncio.sleep(0.05)
        worker.kill()
        return await call

    monkeypatch.setattr(verifier, "WORKERS", 1)
    verifier.close_pool()
    try:
        judge("1/2", "0.5")
        assert asyncio.run(run()) in ("error: ProcessExpired", "error: BrokenProcessPool")
        assert judge("1/2", "0.5") == "right"
    finally:
        verifier.close_pool()


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
def test_the_memory_limit_holds():
    program = (
        "from iapo.tasks.verifier import limit_memory\n"
        "limit_memory(2**28)\n"
        "small = bytearray(2**26)\n"
        "try:\n    large = bytearray(2**29)\n"
        "except MemoryError:\n    print('refused')\n"
    )
    assert output_of(program) == "refused\n"


@pytest.mark.e2e
def test_no_process_survives_a_killed_parent():
    """The parent is killed while a worker works, and can clean up nothing."""
    program = (
        "import asyncio\n"
        "from iapo.tasks.verifier import verdict\n"
        "async def main():\n"
        "    await verdict('1/2', '0.5', 20.0)\n"
        "    print('ready', flush=True)\n"
        f"    await verdict('{HOSTILE}', '5', 1.5)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        time.sleep(0.5)
        descendants = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    assert len(descendants) >= 2
    _, alive = psutil.wait_procs(descendants, timeout=10)
    # Where nothing reaps orphans, an ended process stays a zombie.
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []


def test_importing_the_module_starts_nothing_and_loads_no_sympy():
    program = "import iapo.reward, sys; print('sympy' in sys.modules, 'verl' in sys.modules)"
    assert output_of(program) == "False False\n"
