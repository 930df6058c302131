#!/usr/bin/env bash
# datasets 5.2.0 replaces os.environ by a copy of itself.
#
# Dataset.map and Dataset.filter with num_proc of 1 or more put TOKENIZERS_PARALLELISM=false into the environment for
# their processes. To undo that they assign a deep copy, made before, to os.environ. So os.environ is another object from
# then on. Who holds the old one, by `from os import environ` or in a clean-up such as that of pytest's monkeypatch,
# reads and writes a mapping that nobody else looks at: monkeypatch.setenv is never undone. And the variable stays in the
# C environment, where os.environ lacks it.
#
# num_proc=None does neither. verl's RLHFDataset filters long prompts with num_proc=1 by default
# (data.filter_overlong_prompts_workers), so this happens in every process that reads its data.
#
# Output seen on 2026-11-27 (Linux, x86_64, Python 3.11):
#   datasets 5.2.0, num_proc=None: os.environ is the same object True
#   datasets 5.2.0, num_proc=1: os.environ is the same object False
#   set after that, read through 'from os import environ': None
#   TOKENIZERS_PARALLELISM: in os.environ None, in C b'false'
# Fails if os.environ stays the same object.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check datasets==5.2.0
cd "$folder"
HF_DATASETS_DISABLE_PROGRESS_BARS=1 env -u TOKENIZERS_PARALLELISM "$folder/venv/bin/python" - <<'PYTHON'
import ctypes
import os
from os import environ

import datasets

rows = datasets.Dataset.from_dict({"number": [1, 2, 3, 4]})
same = {}
for num_proc in (None, 1):
    rows.filter(lambda row: row["number"] > 1, num_proc=num_proc)
    same[num_proc] = os.environ is environ
    print(f"datasets {datasets.__version__}, num_proc={num_proc}: os.environ is the same object {same[num_proc]}")
os.environ["SET_AFTER_THAT"] = "1"
print(f"set after that, read through 'from os import environ': {environ.get('SET_AFTER_THAT')}")
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
name = "TOKENIZERS_PARALLELISM"
print(f"{name}: in os.environ {os.environ.get(name)}, in C {getenv(name.encode())}")
if same != {None: True, 1: False}:
    raise SystemExit("CHANGED: os.environ was not replaced where it used to be")
PYTHON
