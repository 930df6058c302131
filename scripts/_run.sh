#!/usr/bin/env bash
# What the run_*.sh scripts share: bash scripts/_run.sh [--dry-run] variant=... model=... data=... [key=value ...]
# Trains on this machine's GPUs (CUDA_VISIBLE_DEVICES picks them), from any working directory; relative paths in the
# arguments are relative to the repository. Arguments go to iapo.train, where a later one wins, so platform=cpu works.
#   PYTHON         the Python to use; by default the repository's .venv, else python3
#   IAPO_DATA_DIR  where iapo data puts data sets; by default data/ of the repository
# Exit status: 2 when something is missing or wrong (nothing was started), else iapo.train's.
set -euo pipefail
# The caller's relative paths mean the caller's folder, which the next line leaves.
[ -z "${IAPO_DATA_DIR:-}" ] || IAPO_DATA_DIR=$(realpath -m "$IAPO_DATA_DIR")
[[ ${PYTHON:-} != */* ]] || PYTHON=$(realpath -ms "$PYTHON")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() {
    echo "_run.sh: $1" >&2
    exit 2
}

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
fix="run bash scripts/setup.sh gpu, or set PYTHON"
command -v "$PYTHON" >/dev/null || refuse "PYTHON: '$PYTHON' is no program; $fix"
for package in iapo verl; do
    "$PYTHON" -c "import importlib.metadata as m; m.version('$package')" 2>/dev/null ||
        refuse "PYTHON: '$PYTHON' has no package $package; $fix"
done
# GPUs, data and model are iapo.train's to look for.
export IAPO_DATA_DIR=${IAPO_DATA_DIR:-$PWD/data}
exec "$PYTHON" -u -m iapo.train platform=gpu "$@"
