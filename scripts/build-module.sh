#!/usr/bin/env bash
#
# Builds the module into target/: `scripts/build-module.sh [hf|hooks]`.
#
#   (nothing)  target/warmpath.wasm     compiled tokenizers only
#   hf         target/warmpath-hf.wasm  and Hugging Face's own engine, for the
#                                       kinds that the compiler refuses
#   hooks      target/warmpath-hooks.wasm  can be crashed and read by tests;
#                                       never shipped
#
# Beside the module, what cargo built for it (target/NAME.crates.json): what its bill
# of materials is checked against.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"

variant=${1:-plain}
case $variant in
  plain) name=warmpath profile=wasm features=() ;;
  hf) name=warmpath-hf profile=wasm-hf features=(--features hf-tokenizers) ;;
  hooks) name=warmpath-hooks profile=wasm-hooks features=(--features test-hooks) ;;
  *)
    echo "usage: ${0##*/} [hf|hooks]" >&2
    exit 2
    ;;
esac

# The linker leaves room for the longest form of every address and number unless
# it is told not to: 7 % of the code.
"$ROOT/scripts/wasm-cargo.sh" rustc --package warmpath-filter --lib \
  --profile "$profile" "${features[@]}" --message-format=json-render-diagnostics \
  -- -Clink-arg=--compress-relocations >"$ROOT/target/$name.crates.$$"
mv "$ROOT/target/$name.crates.$$" "$ROOT/target/$name.crates.json"

built=$ROOT/target/wasm/wasm-target/$profile/warmpath.wasm
module=$ROOT/target/$name.wasm
if ! cmp -s "$built" "$module"; then
  # Beside and renamed: an Envoy that is reading the old module keeps it whole.
  cp "$built" "$module.new"
  mv "$module.new" "$module"
fi
echo "$(wc -c <"$module") bytes in target/$name.wasm"
