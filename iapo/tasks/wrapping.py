"""What is written around an answer, or how it is typeset, and says nothing about its value. Pure functions of text.

    unwrapped("**Answer:** $\\boxed{42}$.") == "42"
    bare("\\left( \\dfrac{1}{2}, 3 \\right)") == "(\\frac{1}{2},3)"

Answers and reference answers pass the same functions. Two texts with the same `bare` are equal without math-verify.
"""

import re

SPACE = r"(?:\s|(?<!\\)\\[,;:\ ]|~|\\q?quad(?![A-Za-z]))"
FONT = r"\\(?:text|textrm|textnormal|textit|textbf|mathrm|mathit|mathbf|mathsf|boldsymbol|bm|mbox)\s*"
DEPTH = 8  # wrappers inside wrappers that are removed: a bound on the work for a hostile text

_BOLD = re.compile(r"(?<!\S)(\*\*|__)(?=[^\s*_])((?:(?!\1).)+)\1(?![\w*])", re.DOTALL)  # not the power in 2**3
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|\\(?:display|text)style(?![A-Za-z])")
_DOLLAR = re.compile(r"(?<!\\)\$")
_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|my|our)\s+)?(?:(?:final|correct)\s+)?answer\s*(?:is\b\s*:?|:)",
    re.IGNORECASE,
)
_EQUALS = re.compile(r"^(?:=|\\approx(?![A-Za-z]))")
_FULL_STOP = re.compile(r"(?<!\.)\.{1,2}$")  # two where one is inside a wrapper and one after it
_BOX = r"\\f?box(?:ed)?\s*\{"
_SIGN = r"\s*(?:\\?%|°|\^\\circ|\^\{\\circ\})"
_SIZE = re.compile(r"\\(?:left\.|right\.|(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z]))")


def unwrapped(text: str) -> str:
    """`text` without its wrappers, in whatever order they are nested.

    Wrappers: Markdown bold and math delimiters, anywhere; "Answer:" or "The answer is" at the start, also with "final"
    or "so"; `=` or `\\approx` at the start; a full stop at the end; `\\boxed{}`, braces and, but for words, a font
    command around all of it.

    Degenerate cases: a single `$` is a currency sign and stays. Two boxes side by side are a list of two answers. An
    ellipsis is no full stop.
    """
    for _ in range(DEPTH):
        before = text
        text = _DELIMITER.sub(" ", _BOLD.sub(r"\2", text.strip()))
        if len(_DOLLAR.findall(text)) % 2 == 0:
            text = _DOLLAR.sub("", text)
        text = _EQUALS.sub("", _LEAD_IN.sub("", text.strip()).strip()).strip()
        text = _FULL_STOP.sub("", _unboxed(text)).strip()
        if text == before:
            break
    return text


def _unboxed(text: str) -> str:
    r"""Without `\boxed`. Its braces go too where nothing follows, or only a percent or degree sign.

    math-verify reads only what is in boxes, so `\boxed{2} thirds` would be 2; here it becomes `{2} thirds`.
    """
    text = re.sub(rf"\}}\s*{_BOX}", "}, {", text)
    text = re.sub(_BOX, "{", text)
    around = re.fullmatch(rf"(?:{FONT})?\{{(.*?)\}}({_SIGN})?", text, re.DOTALL)
    if around is None or not balanced(around[1]) or (text[0] == "\\" and re.fullmatch(r"[A-Za-z\s]*", around[1])):
        return text
    return around[1].strip() + (around[2] or "")


def balanced(text: str) -> bool:
    """Whether every brace that LaTeX groups with has its partner, in order."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def bare(text: str) -> str:
    """One spelling of an unwrapped text: no `\\left`, `\\big`, font commands and blanks, and `\\frac` for `\\dfrac`.

    Blanks between two digits stay: `\\frac1 23` is not `\\frac12 3`.
    """
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", _SIZE.sub("", text))
    text = re.sub(rf"{FONT}\{{([^{{}}]*)\}}", r"\1", text)
    return re.sub(r"(?<![0-9.]) | (?![0-9.])", "", re.sub(rf"{SPACE}+", " ", text))
