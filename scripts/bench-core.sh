#!/usr/bin/env bash
#
# Measures the core's stages natively and in V8: `scripts/bench-core.sh [--quick]`.
#
# Writes target/bench/parts/core.json and target/bench/sizing.md. Needs node and
# the tokenizers of five families, which it fetches.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/fetch-tokenizer.sh all
scripts/wasm-cargo.sh build --package warmpath-core-bench --lib --profile wasm
exec cargo run --locked --release --package warmpath-core-bench --bin bench-core -- "$@"
