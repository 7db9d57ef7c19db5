#!/usr/bin/env bash
# A trained model as one plain Hugging Face folder, for transformers, vLLM and scripts/inference.sh alike:
#
#   bash scripts/export.sh --checkpoint model/MR/RUN/best --output_dir exported
#
# The first run installs what is needed (scripts/setup.sh). Relative paths start where you are.
# docs/arguments.md has every option.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/export.py" "$@"
