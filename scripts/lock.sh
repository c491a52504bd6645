#!/usr/bin/env bash
# Rewrites requirements.lock: one file of exact versions for every extra, Python 3.11 and newer.
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/uv pip compile pyproject.toml --universal --all-extras --python-version 3.11 \
  --no-annotate --no-header --quiet --output-file requirements.lock
