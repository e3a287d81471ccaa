#!/usr/bin/env bash
#
# rustc for `make fuzz` (RUSTC_WRAPPER): our crates, and the template engine that
# runs inside them, are compiled with the counters that libFuzzer steers by; all
# others as ever, so that neither their build nor a run's sweep over the counters
# takes longer than it must.
set -euo pipefail

rustc=$1
shift
crate=
previous=
for argument in "$@"; do
  if [[ $previous == --crate-name ]]; then
    crate=$argument
    break
  fi
  previous=$argument
done

case $crate in
  warmpath_core | warmpath_sidecar | minijinja)
    exec "$rustc" "$@" \
      -Cpasses=sancov-module \
      -Cllvm-args=-sanitizer-coverage-level=4 \
      -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
      -Cllvm-args=-sanitizer-coverage-pc-table \
      -Cllvm-args=-sanitizer-coverage-trace-compares \
      -Ccodegen-units=1
    ;;
  *) exec "$rustc" "$@" ;;
esac
