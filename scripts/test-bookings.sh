#!/usr/bin/env bash
#
# Bookings under races, faults and crashes: `scripts/test-bookings.sh [options of
# warmpath-run bookings]`. Both modules must have been built. BOOKINGS_STREAMS says
# how many streams go through all faults (100000; from 5000 on every fault is
# met). The last line is
# `N passed, N failed`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What can crash a VM must be in the module of the tests, and is not in the shipped
# one: scripts/check_module.py finds it in the one and not in the other.
hooks=$(python3 scripts/check_module.py target/warmpath-hooks.wasm || true)
shipped=$(python3 scripts/check_module.py target/warmpath.wasm || true)
if ! grep -q '^FAILED has no hooks of tests' <<<"$hooks" ||
  ! grep -q '^ok     has no hooks of tests' <<<"$shipped"; then
  echo 'FAILED the module of the tests has hooks, the shipped one has none'
  echo '0 passed, 1 failed'
  exit 1
fi
echo 'ok     the module of the tests has hooks, the shipped one has none'

exec scripts/stack.sh bookings --streams "${BOOKINGS_STREAMS:-100000}" "$@"
