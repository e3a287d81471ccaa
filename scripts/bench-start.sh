#!/usr/bin/env bash
#
# How the gateway starts: `scripts/bench-start.sh [prepare] [--quick]`. With
# `prepare` it only builds what it needs; else that must have been built.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

if [[ ${1:-} == prepare ]]; then
  scripts/build-module.sh
  build_programs
  exit
fi
if ! ENVOY=$(find_envoy); then
  echo 'error: no Envoy; see: make doctor' >&2
  exit 1
fi
export ENVOY
bin_dir=$(dirname "$(bench_program engine-sim)")
exec python3 scripts/bench_start.py --bin-dir "$bin_dir" "$@"
