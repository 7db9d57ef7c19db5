#!/usr/bin/env bash
# Everything that must hold before a change lands: ruff, its formatter, and the tests. Arguments go to pytest:
#   bash scripts/test.sh
#   bash scripts/test.sh -m 'not slow'
#   bash scripts/test.sh tests/test_rewards.py -k stsb
# One that fails does not keep the others from running; the exit status is that of the last one that failed.
set -uo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
bash "$root/scripts/setup.sh" --test || exit 1
cd -- "$root" || exit 1

status=0
.venv/bin/python -m ruff check . || status=$?
.venv/bin/python -m ruff format --check . || status=$?
.venv/bin/python -m pytest "$@" || status=$?
exit "$status"
