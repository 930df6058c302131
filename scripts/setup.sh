#!/usr/bin/env bash
# Set up everything that training needs: bash scripts/setup.sh cpu|gpu [--dev] [--system]
#   cpu       the real stack without a GPU;  gpu  verl's own tested CUDA set
#   --dev     also what the tests need
#   --system  install into the Python on PATH (a container image) instead of .venv
# A finished set-up is reused: it is redone only when pyproject.toml or this script changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

platform=${1:-}
case $platform in cpu | gpu) shift ;; *)
    echo "setup.sh: platform '${platform}' must be cpu or gpu: bash scripts/setup.sh cpu" >&2
    exit 2
    ;;
esac
extras=$platform system=no
for option in "$@"; do
    case $option in
        --dev) extras+=,dev ;;
        --system) system=yes ;;
        *) echo "setup.sh: unknown option '$option'; known are --dev and --system" >&2 && exit 2 ;;
    esac
done

base_python=${PYTHON:-python3}
if ! "$base_python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'; then
    echo "setup.sh: $("$base_python" --version 2>&1) can't run verl; set PYTHON to a Python 3.10, 3.11 or 3.12" >&2
    exit 2
fi
if [ "$system" = yes ]; then
    python=$base_python stamp=/tmp/iapo-setup-$platform
else
    [ -x .venv/bin/python ] || "$base_python" -m venv .venv
    python=.venv/bin/python stamp=.venv/iapo-setup
fi

fingerprint="$extras $(cat pyproject.toml scripts/setup.sh | sha256sum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ]; then
    exit 0
fi
# A set-up with the test tools serves a run without them too.
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$platform,dev ${fingerprint#* }" ]; then
    exit 0
fi

trap 'exit 130' INT # pip survives Ctrl-C as a failure, which must not start another install
start=$SECONDS
say() { printf 'setup: %s (%d s)\n' "$1" $((SECONDS - start)); }
# pip says nothing for minutes, so something else gives a sign of life meanwhile.
pip() {
    local status=0
    while sleep 20 >/dev/null && kill -0 $$; do say "still installing"; done 2>/dev/null &
    trap "kill $! 2>/dev/null || true" EXIT
    "$python" -m pip --disable-pip-version-check "$@" || status=$?
    kill $! || true
    trap - EXIT
    return $status
}

say "installing for $platform; the first time takes minutes and several GB"
if [ "$platform" = cpu ]; then
    # The CPU build of torch first, so that the CUDA build and its gigabytes are never fetched. It is on PyTorch's own
    # index; where that doesn't answer, whatever torch of this version pip finds is taken.
    torch=$(sed -n 's/^cpu = .*"torch==\([0-9.]*\)".*/\1/p' pyproject.toml)
    "$python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null ||
        pip install -q --retries 0 --timeout 20 "torch==$torch+cpu" \
            --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
        pip install -q "torch==$torch"
    "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || {
        echo "setup.sh: pip found only a CUDA build of torch $torch for $("$python" --version), which vLLM's CPU build" \
            "refuses; make https://download.pytorch.org/whl/cpu reachable, or set PYTHON to another Python" >&2
        exit 1
    }
    say "torch $torch is there, now verl, vLLM and the rest"
fi
if [ "$platform" = gpu ] && ! "$python" -c 'import flash_attn' 2>/dev/null; then
    # verl's flash-attn is built against the torch that is there, which pip's isolated build would hide from it.
    torch=$(sed -n 's/^gpu = .*"torch==\([0-9.]*\)".*/\1/p' pyproject.toml)
    pip install -q "torch==$torch" packaging ninja psutil wheel setuptools
    pip install -q --no-build-isolation flash-attn==2.8.3
fi
pip install -q -e ".[$extras]"
if [ "$platform" = cpu ]; then
    # CUDA builds that come along and break `import vllm` on a machine without CUDA.
    pip uninstall -q -y torchvision torchaudio torchcodec
fi
say "checking"
"$python" -c 'import iapo.information, verl, vllm, transfer_queue, math_verify'
echo "$fingerprint" >"$stamp"
say "done"
