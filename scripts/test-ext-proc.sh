#!/usr/bin/env bash
#
# The sidecar's endpoint picker: its tests against a gRPC client, and a real Envoy
# that asks it beside one with the module: `scripts/test-ext-proc.sh [options of
# warmpath-run ext-proc]`. The module must have been built. The last line is
# `N passed, N failed`, of both together.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

passed=0 failed=0
# Adds up what a part's log says. A part that counts nothing is a failure.
add() {
  local name=$1 log=$2 status=$3 counted
  counted=$(sed -nE 's/^test result: .* ([0-9]+) passed; ([0-9]+) failed;.*/\1 \2/p; s/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' "$log")
  local more=0 less=0
  while read -r good bad; do
    more=$((more + good)) less=$((less + bad))
  done <<<"${counted:-0 0}"
  if ((status != 0 && less == 0)) || ((more + less == 0)); then
    echo "FAILED $name: status $status, nothing counted"
    less=$((less + 1))
  fi
  passed=$((passed + more)) failed=$((failed + less))
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
for part in '--lib picker::' '--test loopback picker::'; do
  # shellcheck disable=SC2086
  cargo test --locked -p warmpath-sidecar $part 2>&1 | tee "$log"
  add "the picker's tests ($part)" "$log" "${PIPESTATUS[0]}"
done
scripts/stack.sh ext-proc "$@" 2>&1 | tee "$log"
add 'the picker beside the module' "$log" "${PIPESTATUS[0]}"
echo "$passed passed, $failed failed"
((failed == 0))
