#!/usr/bin/env bash
# Set up and run the whole test suite; arguments go to pytest: bash scripts/test.sh -m "not e2e"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh cpu --dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Two processes, a file in one of them and in its order: one gets to test_end_to_end.py early, whose runs often wait, and
# the other does the rest. The second file of runs comes near the end.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
