#!/usr/bin/env bash
#
# What small requests pay for long prompts on the same worker thread:
# `scripts/bench-neighbour.sh [options of warmpath-run]`. With `prepare` it only builds
# what it needs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

if [[ ${1:-} == prepare ]]; then
  scripts/build-module.sh
  exec cargo build --release --workspace --bins --locked
fi
exec_with_envoy bench-neighbour "$@"
