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
  build_programs
  exit
fi
exec_with_envoy bench-neighbour "$@"
