#!/usr/bin/env bash
#
# `make run`: from a fresh checkout to a running gateway. Says what it does and
# how long it takes; on failure says where to look.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

step=''
failed() {
  echo >&2
  echo "make run stopped at: $step" >&2
  echo 'What is missing on this machine, if anything, says: make doctor' >&2
}
trap failed ERR

say() {
  step=$1
  echo "[$1]${2:+ $2}"
}

if [[ ! -e target/warmpath.wasm ]]; then
  echo 'First run: 5 to 10 minutes on two cores, most of it compiling. Later runs: seconds.'
fi
say '1/4 set up' 'Envoy, tokenizer, toolchain for the module'
scripts/setup.sh install run
say '2/4 module' 'target/warmpath.wasm'
scripts/build-module.sh
say '3/4 programs' 'sidecar, engine simulator'
cargo build --workspace --bins --locked
say '4/4 start' 'Envoy, the sidecar and three simulated engines; Ctrl-C stops them'
trap - ERR
exec scripts/stack.sh demo "$@"
