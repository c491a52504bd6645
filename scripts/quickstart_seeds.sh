#!/usr/bin/env bash
# Repeats the quickstart for several seeds and prints its last lines of each.
# Usage: bash scripts/quickstart_seeds.sh [SEED ...]     default: 0 1 2
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
if [ $# = 0 ]; then set -- 0 1 2; fi
for seed in "$@"; do
  echo "seed $seed"
  start=$SECONDS
  bash "$here/quickstart.sh" --config.seed="$seed" --workdir="runs/quickstart_seed_$seed" |
    tee "/dev/stderr" | grep -E '^(success|speed|bottleneck|staleness) ' | sed 's/^/  /'
  echo "  took $((SECONDS - start))s"
done
