#!/usr/bin/env bash
# Benchmarks: bash benchmarks/run.sh [a b c d e] [--quick], or run.sh gpu, see benchmarks/README.md.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [[ "${1:-}" == gpu ]]; then # one CUDA card: tests, exactness, speed
    bash "$root/scripts/setup.sh" --test
    exec "$root/.venv/bin/python" "$root/benchmarks/gpu.py" "${@:2}"
fi
bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/benchmarks/run.py" "$@"
