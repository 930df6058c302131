#!/usr/bin/env bash
# Check the exit-entropy pass on a GPU: bash scripts/gpu_check.sh [--device cpu] [OUT_FOLDER]
# From the tree, without installing this package, under this machine's own torch and transformers, in under ten minutes.
# The part on values runs tests, so pytest, pytest-timeout and hypothesis must be there too.
# Writes OUT_FOLDER/report.md and numbers.jsonl (default: runs/gpu-check): values of the kernels, exactness in bf16 and
# float32, speed against the floor and against KV copies at Qwen2.5-0.5B's shape at T = 2048 and 16384, peak memory.
#   --device cpu   tiny sizes, to try the script where there is no GPU
#   PYTHON         the Python to use; by default python3, or the repository's .venv where that one's torch sees a GPU
# Exit status: 0 all parts passed, 1 one failed, which the report says with its last lines, 2 nothing was started.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() {
    echo "gpu_check.sh: $1" >&2
    exit 2
}

sees_gpu() {
    "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}

device=cuda
if [ "${1:-}" = --device ]; then
    [[ ${2:-} = cpu || ${2:-} = cuda ]] || refuse "--device: '${2:-}' must be cuda or cpu"
    device=$2
    shift 2
fi
[ $# -le 1 ] && [[ ${1:-} != -* ]] || refuse "arguments: '$*'; known are --device cpu and one folder"
out=$(realpath -m "${1:-$root/runs/gpu-check}")
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    own=$root/.venv/bin/python
    [ ! -x "$own" ] || { [ "$device" = cuda ] && ! sees_gpu "$own"; } || PYTHON=$own
fi
cd "$root"
missing=$("$PYTHON" -c '
from importlib.util import find_spec
needed = ["torch", "transformers", "pytest", "pytest_timeout", "hypothesis"]
print(*(name.replace("_", "-") for name in needed if find_spec(name) is None))') ||
    refuse "PYTHON: '$PYTHON' can't be run; set PYTHON"
[ -z "$missing" ] || refuse "PYTHON: '$PYTHON' lacks $missing; install that (pip install $missing), or set PYTHON"
if [ "$device" = cuda ] && ! sees_gpu "$PYTHON"; then
    refuse "--device: torch sees no GPU; run on a machine with one, or try the script with --device cpu"
fi
mkdir -p "$out"
report=$out/report.md numbers=$out/numbers.jsonl
: >"$numbers"
export PYTHONPATH=$root PYTHONDONTWRITEBYTECODE=1
failed=0

# part TITLE SECONDS COMMAND...: its output goes to the report; a failure doesn't stop the parts after it.
part() {
    local title=$1 seconds=$2 status=0 start=$SECONDS
    shift 2
    echo "gpu_check: $title (at most $seconds s)"
    timeout --kill-after=10 "$seconds" "$@" >"$out/part.out" 2>"$out/part.err" || status=$?
    {
        echo "## $title"
        echo
        if [ "$status" -eq 0 ]; then
            cat "$out/part.out"
        else
            echo "FAILED with status $status$([ "$status" -ne 124 ] || echo ' (out of time)'), its last lines:"
            echo '```'
            tail -n 30 "$out/part.out" "$out/part.err"
            echo '```'
            failed=1
        fi
        echo
        echo "$((SECONDS - start)) s"
        echo
    } >>"$report"
}

check=("$PYTHON" -m benchmarks.gpu_check --device "$device" --json "$numbers")
lengths=(2048 16384)
only=()
if [ "$device" = cpu ]; then
    check+=(--quick)
    lengths=(64)
    only=(-k "staircase or by_hand")
fi
echo "# Check of the exit-entropy pass, $(date -u +%Y-%m-%d), commit $(git describe --always --dirty=+ 2>/dev/null || echo unknown)" >"$report"
echo >>"$report"
part "Machine" 60 "${check[@]}" machine
part "Values of the kernels" 180 "$PYTHON" -m pytest -q -p no:cacheprovider "${only[@]}" \
    tests/test_attention.py tests/test_output_layer.py tests/test_information.py
part "Exactness" 120 "${check[@]}" exactness
for length in "${lengths[@]}"; do
    part "Speed and memory at T = $length" 110 "${check[@]}" speed --length "$length"
done
rm -f "$out/part.out" "$out/part.err"
echo "gpu_check: $([ "$failed" -eq 0 ] && echo 'all parts passed' || echo 'a part FAILED'), see $report"
exit "$failed"
