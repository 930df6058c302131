#!/usr/bin/env bash
# verl 0.9.1 without flash-attn computes log-probs one token at a time.
#
# verl.utils.torch_functional.logprobs_from_logits takes flash-attn's cross entropy where it is installed. Without it, as
# on every CPU, it makes one logsumexp per token in a Python loop, "to reduce peak mem consumption". The autograd graph
# gets a node per token, and forward and backward take tens of times as long as one logsumexp over all rows, which
# has the same bits. For a small model that is more than its own forward and backward.
#
# Output seen on 2026-11-27 (CPU, x86_64, one thread):
#   verl 0.9.1, torch 2.13.0+cpu: 2048 tokens, logsumexp nodes: verl 2048, one call 1
#   same bits: values True, gradients True
#   forward and backward take 38 times as long
# Fails if verl stops looping, or if the bits differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install -q --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
"${pip[@]}" verl==0.9.1 torch==2.13.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import time
from importlib.metadata import version

import torch
from verl.utils.torch_functional import logprobs_from_logits


def vectorised(logits, labels):
    return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)


def nodes(function, seen):
    """How many logsumexp nodes the graph behind an autograd function has."""
    if function is None or function in seen:
        return 0
    seen.add(function)
    own = "LogsumexpBackward" in function.name()
    return own + sum(nodes(parent, seen) for parent, _ in function.next_functions)


tokens, words = 2048, 32
torch.manual_seed(0)
logits = torch.randn(tokens, words, requires_grad=True)
labels = torch.randint(words, (tokens,))
results = {}
for name, function in (("verl", logprobs_from_logits), ("one call", vectorised)):
    start = time.perf_counter()
    log_probs = function(logits, labels)
    (gradient,) = torch.autograd.grad(log_probs.square().sum(), logits, retain_graph=True)
    seconds = time.perf_counter() - start
    results[name] = log_probs, gradient, nodes(log_probs.grad_fn, set()), seconds
loop, one = results["verl"], results["one call"]
print(f"verl {version('verl')}, torch {torch.__version__}: {tokens} tokens, logsumexp nodes: verl {loop[2]}, one call {one[2]}")
print(f"same bits: values {torch.equal(loop[0], one[0])}, gradients {torch.equal(loop[1], one[1])}")
print(f"forward and backward take {loop[3] / one[3]:.0f} times as long")
if loop[2] != tokens or one[2] != 1:
    raise SystemExit("CHANGED: verl no longer makes a logsumexp per token")
if not (torch.equal(loop[0], one[0]) and torch.equal(loop[1], one[1])):
    raise SystemExit("CHANGED: one logsumexp over all rows has other bits")
PYTHON
