#!/usr/bin/env bash
#
# Who may feed the gateway, what old frames do, and what is left of a request, in front
# of a real Envoy: `scripts/test-secure.sh [options of warmpath-run secure]`. The module
# must have been built. The last line is `N passed, N failed`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

capabilities=$(python3 scripts/check_capabilities.py target/warmpath.wasm) || {
  echo "$capabilities"
  exit 1
}
exec scripts/stack.sh secure "$@"
