#!/usr/bin/env bash
# DAPO on GSM8K with Qwen2.5-0.5B-Instruct:
#   bash scripts/run_dapo_qwen0.5b.sh [--dry-run] [key=value ...]
# Needs GPUs (bash scripts/setup.sh gpu) and the data (iapo data gsm8k); scripts/_run.sh says what it checks.
exec bash "$(dirname "${BASH_SOURCE[0]}")/_run.sh" variant=dapo model=qwen2.5-0.5b-instruct data=gsm8k "$@"
