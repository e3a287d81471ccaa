#!/usr/bin/env bash
#
# Measures the core's stages natively and in V8: `scripts/bench-core.sh [--quick]`.
# With `prepare` it only builds what it needs, and fetches the tokenizers of five
# families and text in many languages. Needs node.
#
# Writes target/bench/parts/core.json and target/bench/sizing.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

if [[ ${1:-} == prepare ]]; then
  scripts/fetch-tokenizer.sh all
  scripts/fetch-corpus.sh
  scripts/wasm-cargo.sh build --package warmpath-core-bench --lib --profile wasm
  build_programs
  exit
fi
program=$(bench_program bench-core)
exec "$program" "$@"
