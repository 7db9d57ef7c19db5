#!/usr/bin/env bash
# Everything that must hold before a change lands: ruff, its formatter, and the tests. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh -m 'not slow'
#   bash scripts/test.sh tests/test_rewards.py -k number
# One that fails does not keep the others from running; the exit status is that of the last one that failed.
set -uo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
bash "$root/scripts/setup.sh" --test || exit 1
cd -- "$root" || exit 1

status=0
.venv/bin/python -m ruff check . || status=$?
.venv/bin/python -m ruff format --check . || status=$?
# Two files at a time, a core each: torch takes all cores for itself, and two processes that do so are slower than one.
# In their own order: xdist would leave those with few tests, which are the slowest here, for the end.
export OMP_NUM_THREADS=1
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
exit "$status"
