#!/usr/bin/env bash
#
# Starts Envoy with the module, the sidecar and three simulated engines:
# `scripts/stack.sh demo|smoke [options of warmpath-run]`. The module must have
# been built. Ends with the status of warmpath-run, which also stops what it
# has started.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

if ! ENVOY=$(find_envoy); then
  echo 'error: no Envoy; see: make doctor' >&2
  exit 1
fi
export ENVOY

# All at once, as the tests build them: chosen singly, the crates would get
# other feature sets and be built twice.
executables=$(mktemp)
trap 'rm -f "$executables"' EXIT
cargo build --workspace --bins --locked --message-format=json-render-diagnostics >"$executables"
program=$(sed -n 's|.*"executable":"\([^"]*/warmpath-run\)".*|\1|p' "$executables")
if [[ -z $program ]]; then
  echo 'error: the build gave no warmpath-run' >&2
  exit 1
fi
rm -f "$executables"
exec "$program" "$@"
