#!/usr/bin/env bash
#
# What a gateway adds to a request: `scripts/bench-gateway.sh [options of
# bench-gateway]`. The module must have been built.
#
#   prepare          builds and installs what is needed, and ends: the picker (once;
#                    16 minutes on two cores), SGLang's router, Dynamo (1 GB)
#   prepare --quick  the same without any peers
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

if [[ ${1:-} == prepare ]]; then
  [[ -s $MODELS/qwen3/tokenizer.json ]] || scripts/fetch-tokenizer.sh qwen3
  scripts/fetch-corpus.sh
  build_programs
  if [[ ${2:-} != --quick ]]; then
    cargo build --release --locked --manifest-path tests/picker/Cargo.toml \
      --target-dir target/picker
    scripts/install-peer.sh sglang-router "$SGLANG_ROUTER_PACKAGE" sglang-router
    scripts/install-dynamo.sh
  fi
  exit
fi

ENVOY=$(find_envoy) || { echo 'error: no Envoy; see: make doctor' >&2; exit 1; }
export ENVOY
program=$(bench_program bench-gateway)
exec scripts/isolated.sh "$program" "$@"
