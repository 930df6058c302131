#!/usr/bin/env bash
# Every method on the embedded task, in one table: bash scripts/reproduce_table.sh [--quick] [options] [key=value ...]
# Sets up .venv on first use; --help lists the options. See benchmarks/table/reproduce_table.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in
    *" --help "* | *" -h "*)
        [ -x .venv/bin/python ] && exec .venv/bin/python -m benchmarks.table.reproduce_table --help
        sed -n '2,/^"""/{/^"""/!p}' benchmarks/table/reproduce_table.py
        exit
        ;;
esac
bash scripts/setup.sh cpu
exec .venv/bin/python -u -m benchmarks.table.reproduce_table "$@"
