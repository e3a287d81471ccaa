#!/usr/bin/env bash
#
# How soon engines' events count in the gateway, and what feeding costs it:
# `scripts/bench-feed.sh [--quick] [options of bench-feed]`. With `prepare` it only
# builds what it needs. As root, or with a limit on real-time priorities that allows
# one, the pauses are those of the feed's work alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

if [[ ${1:-} == prepare ]]; then
  scripts/build-module.sh hooks
  build_programs
  exit
fi
exec_with_envoy bench-feed "$@"
