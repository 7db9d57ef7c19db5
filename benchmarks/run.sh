#!/usr/bin/env bash
# Benchmarks: bash benchmarks/run.sh [a b c d e] [--quick], see benchmarks/README.md.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/benchmarks/run.py" "$@"
