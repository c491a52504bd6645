#!/usr/bin/env bash
# The main job on a fresh machine: installs what is needed, trains, prints success before and after.
# Usage: bash scripts/quickstart.sh [--config.section.field=value ...] [--workdir=DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment ""
cd "$ROOT"
exec "$PYTHON" -m jaxvla.main --config=configs/quickstart.py "$@"
