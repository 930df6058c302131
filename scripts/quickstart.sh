#!/usr/bin/env bash
# From nothing to a trained model: bash scripts/quickstart.sh [VARIANT] [key=value ...]
# Sets up .venv on first use, then trains the embedded tiny model on verbose arithmetic with VARIANT (default iapo_rate;
# also iapo, grpo, dapo) on the real stack: verl, Ray, FSDP2, a vLLM server. Prints a table, before and after.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

variant=iapo_rate
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    sed -n '2,4s/^# //p' scripts/quickstart.sh
    exit 0
fi
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
    variant=$1
    shift
fi
if [ ! -f "recipes/variant/$variant.yaml" ]; then
    echo "quickstart.sh: variant '$variant' must be one of $(cd recipes/variant && ls | sed 's/\.yaml$//' | xargs)" >&2
    exit 2
fi
start=$SECONDS
if [ -z "${IAPO_PLATFORM:-}" ]; then
    IAPO_PLATFORM=cpu
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && IAPO_PLATFORM=gpu
fi
bash scripts/setup.sh "$IAPO_PLATFORM"

run_dir=runs/quickstart-$variant-$(date +%Y%m%d-%H%M%S)
mkdir -p "$run_dir"
touch "$run_dir/train.log" # for tail, which may be first
echo "quickstart: training $variant; the whole log is in $run_dir/train.log; start-up takes about a minute"
command=(.venv/bin/python -u -m iapo.train "platform=$IAPO_PLATFORM" "variant=$variant" model=tiny
    data=verbose_arithmetic "run_dir=$run_dir" "$@")
stop() { # signal number
    trap '' INT TERM # a second one must not cut the clean-up short
    kill "$training" 2>/dev/null || true
    wait
    echo "quickstart: stopped; this resumes from the last checkpoint, if there is one: cd ${PWD@Q} && ${command[*]@Q}" >&2
    exit $((128 + $1))
}
"${command[@]}" >>"$run_dir/train.log" 2>&1 &
training=$!
trap 'stop 2' INT
trap 'stop 15' TERM
# Show this package's own lines while the log grows; Ray puts the process's name in front of them. In the background,
# because only "wait" lets a signal through at once.
{ tail -n +1 --pid="$training" -f "$run_dir/train.log" | sed -un 's/^.*\(iapo: .*\)$/\1/p'; } &
status=0
wait "$training" || status=$?
wait
if [ "$status" -ne 0 ]; then
    tail -n 25 "$run_dir/train.log" >&2
    # A refused configuration has started and written nothing.
    if [ "$status" -eq 2 ] && [ "$(ls -A "$run_dir")" = train.log ]; then
        rm -r "$run_dir"
    fi
    exit "$status"
fi
.venv/bin/python -m iapo.report "$run_dir" --picture "$run_dir/accuracy_tokens.png"
echo "quickstart: done in $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s; files of the run: $run_dir"
