#!/usr/bin/env bash
#
# Runs cargo for the module's target: `scripts/wasm-cargo.sh build -p ...`.
#
# Chooses the toolchain and linker (toolchain.sh), compiles the standard
# library along, keeps its own target folder apart from the native one, and
# maps every path of the build machine away, so that two machines build the
# same bytes and none of them tells where it was built.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"

if ! sysroot=$(find_wasm_sysroot); then
  echo 'error: no Rust toolchain with the standard library sources; see: make doctor' >&2
  exit 1
fi
if ! linker=$(find_wasm_linker "$sysroot"); then
  echo 'error: no WebAssembly linker (wasm-ld or rust-lld); see: make doctor' >&2
  exit 1
fi
cargo=$sysroot/bin/cargo
export RUSTC=$sysroot/bin/rustc RUSTDOC=$sysroot/bin/rustdoc RUSTC_BOOTSTRAP=1
export CARGO_TARGET_DIR=$ROOT/target/wasm
export CARGO_TARGET_WASM_TARGET_LINKER=$linker
unset RUSTFLAGS RUSTC_WRAPPER RUSTC_WORKSPACE_WRAPPER

# The flags must be the same on every run, or everything is built again; so
# the folders that they name must exist before they are computed.
registry=${CARGO_HOME:-$HOME/.cargo}/registry/src
cd "$ROOT"
if ! compgen -G "$registry/*" >/dev/null; then
  "$cargo" fetch --locked
fi

# Later mappings win. `getrandom_backend`: with a custom backend a crate that
# asks for randomness links against a function of ours instead of importing
# one from JavaScript; nothing in the default module asks.
flags=(
  "--remap-path-prefix=$ROOT=/warmpath"
  "--remap-path-prefix=$sysroot/lib/rustlib/src/rust=/rust"
  '--cfg=getrandom_backend="custom"'
)
for folder in "$registry"/*; do
  flags+=("--remap-path-prefix=$folder=/registry")
done
CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f'; echo "${flags[*]}")
export CARGO_ENCODED_RUSTFLAGS

# Cargo before 1.95 takes a target description without being asked to.
# The library is built for size as well: its sorts alone were 100 KB of the module.
zflags=(-Zbuild-std=std,panic_abort -Zbuild-std-features=optimize_for_size)
if "$cargo" -Z help | grep -q json-target-spec; then
  zflags+=(-Zjson-target-spec)
fi

# What a panic says would be seen nowhere, so the modules put nothing together
# where the compiler can leave that out (from 1.92 on).
if "$cargo" -Z help | grep -q panic-immediate-abort; then
  zflags+=(-Zpanic-immediate-abort)
  export CARGO_PROFILE_{WASM,WASM_HF,WASM_HOOKS}_PANIC=immediate-abort
fi

command=$1
shift
exec "$cargo" "$command" --locked --target "$ROOT/wasm-target.json" "${zflags[@]}" "$@"
