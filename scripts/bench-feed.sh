#!/usr/bin/env bash
#
# How soon engines' events count in the gateway, and what feeding costs it:
# `scripts/bench-feed.sh [--quick] [options of bench-feed]`. The module with hooks
# must have been built (make module-hooks). As root, or with a limit on real-time
# priorities that allows one, the pauses are those of the feed's work alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

if ! ENVOY=$(find_envoy); then
  echo 'error: no Envoy; see: make doctor' >&2
  exit 1
fi
export ENVOY

executables=$(mktemp)
trap 'rm -f "$executables"' EXIT
cargo build --release --workspace --bins --locked \
  --message-format=json-render-diagnostics >"$executables"
program=$(sed -n 's|.*"executable":"\([^"]*/bench-feed\)".*|\1|p' "$executables")
if [[ -z $program ]]; then
  echo 'error: the build gave no bench-feed' >&2
  exit 1
fi
rm -f "$executables"
exec "$program" "$@"
