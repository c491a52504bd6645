#!/usr/bin/env bash
# The test suite on a fresh machine. Usage: bash scripts/test.sh [pytest arguments]
#   bash scripts/test.sh -m ""     with the slow tests, as CI does
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment "dev,openpi,data,libero,ray"
ensure_gl
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pyright
# A file's tests share compiled functions, so they stay in one process. In the order of the files:
# by number of tests, as is the default, the few long ones of tests/integration would come last.
exec "$PYTHON" -m pytest -n logical --maxprocesses=8 --dist loadfile --no-loadscope-reorder "$@"
