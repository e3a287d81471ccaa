#!/usr/bin/env bash
#
# Runs the core's tests in WebAssembly, built for the module's own target, with
# Node as the machine: `scripts/wasm-test.sh [--features ...]`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"

if ! runner=$(find_wasm_runner); then
  echo "error: no wasm-bindgen-test-runner $(wasm_bindgen_version); see: make doctor" >&2
  exit 1
fi
export CARGO_TARGET_WASM_TARGET_RUNNER=$runner
# `--lib`: doctests would be run by another toolchain's rustdoc.
exec "$ROOT/scripts/wasm-cargo.sh" test --lib --package warmpath-core \
  --profile wasm-test "$@"
