#!/usr/bin/env bash
# math-verify 0.8.0 judges answers as equal whose difference it doesn't read: bases, kinds of brackets, words times zero.
#
# One would expect verify(parse(gold), parse(answer)) to be False where the two differ. It is True where
# - only the base differs: 52 and 52_8, and so any base for any other;
# - only the kind of an end differs: (15,-29) and [15,-29], a point and an interval; (2,\infty) and (2,\infty];
# - the answer has words and the gold is 0: the letters are variables, and their product with 0 is 0.
# A reward that calls it pays for these.
#
# Output seen on 2026-11-28 (Linux, x86_64, Python 3.11):
#   math-verify 0.8.0: $52_8$ and $52$: True
#   math-verify 0.8.0: $52_8$ and $52_9$: True
#   math-verify 0.8.0: $(15,-29)$ and $[15,-29]$: True
#   math-verify 0.8.0: $(2,\infty)$ and $(2,\infty]$: True
#   math-verify 0.8.0: $0$ and $0 wombats$: True
# Fails if one of the verdicts changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check 'math-verify[antlr4_13_2]==0.8.0'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from math_verify import parse, verify

PAIRS = [
    ("$52_8$", "$52$"),
    ("$52_8$", "$52_9$"),
    ("$(15,-29)$", "$[15,-29]$"),
    (r"$(2,\infty)$", r"$(2,\infty]$"),
    ("$0$", "$0 wombats$"),
]
changed = []
for gold, answer in PAIRS:
    verdict = verify(parse(gold), parse(answer))
    print(f"math-verify {version('math-verify')}: {gold} and {answer}: {verdict}")
    if not verdict:
        changed.append((gold, answer))
if changed:
    raise SystemExit(f"CHANGED: {changed} are no longer equal")
PYTHON
