#!/usr/bin/env bash
#
# Coverage-guided fuzzing of every decoder that reads bytes from outside.
#
#   scripts/fuzz.sh [TARGET ...]      all targets, or those
#
# FUZZ_SECONDS is the time for each (20). Seeds are made from the repository's
# captures; what a run finds interesting is kept in target/fuzz-corpus and makes
# the next one start further on. The last line is `N passed, N failed`.
#
# A target is a file in tests/fuzz/src/checks and a line in mod.rs beside it.
#
# No nightly toolchain and no cargo-fuzz: libFuzzer is in the libfuzzer-sys crate
# (C++, so it takes a compiler for that), and the counters that steer it are an
# LLVM pass that stable rustc's `-Cpasses` switches on (scripts/fuzz-rustc.sh).
# With RUSTUP_TOOLCHAIN=nightly the same is built by nightly. No sanitizer: our
# crates have no unsafe code, so a fault is a panic, which libFuzzer sees.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

SECONDS_EACH=${FUZZ_SECONDS:-20}
# An input that takes longer, in seconds, or more memory is a failure.
INPUT_SECONDS_MAX=10
MEMORY_MB_MAX=2048
# Longest input in bytes: tokenizers and bodies are longer, but then only more of
# the same.
INPUT_BYTES_MAX=16384
# For making a failing input smaller.
MINIMIZE_SECONDS=30

BUILT=target/fuzz
CORPUS=target/fuzz-corpus
FOUND=target/fuzz-found
LOGS=target/logs

if ! command -v c++ >/dev/null; then
  echo 'fuzz: libFuzzer is C++ and there is no compiler for it; see: make doctor' >&2
  exit 1
fi

RUSTC_WRAPPER=$ROOT/scripts/fuzz-rustc.sh \
  cargo build --manifest-path tests/fuzz/Cargo.toml --target-dir "$BUILT" --locked
mkdir -p "$LOGS"
all=$(WARMPATH_FUZZ_SEEDS=$CORPUS "$BUILT/debug/fuzz")
read -r -a targets <<<"${*:-$(tr '\n' ' ' <<<"$all")}"

# The number in a line of libFuzzer's closing statistics; 0 without one.
statistic() { sed -n "s/^stat::$1: *//p" "$2" | tail -1 | grep . || echo 0; }

fuzz() {
  local target=$1
  shift
  WARMPATH_FUZZ_TARGET=$target "$BUILT/debug/fuzz" \
    -timeout="$INPUT_SECONDS_MAX" -rss_limit_mb="$MEMORY_MB_MAX" "$@"
}

passed=0 failed=0
for target in "${targets[@]}"; do
  found=$FOUND/$target
  log=$LOGS/fuzz-$target.log
  rm -rf "$found"
  mkdir -p "$found"
  regressions=()
  [[ -d tests/fuzz/regressions/$target ]] && regressions=("tests/fuzz/regressions/$target")
  status=0
  fuzz "$target" -max_total_time="$SECONDS_EACH" -max_len="$INPUT_BYTES_MAX" \
    -print_final_stats=1 -artifact_prefix="$found/" \
    "$CORPUS/$target" "${regressions[@]}" >"$log" 2>&1 || status=$?
  runs=$(statistic number_of_executed_units "$log")
  covered=$(sed -n 's/^#.* cov: \([0-9]*\).*/\1/p' "$log" | tail -1)
  inputs=$(find "$CORPUS/$target" -type f | wc -l)
  summary=$(printf '%-18s %9s runs %6s edges %5s inputs' "$target" "$runs" "${covered:-0}" "$inputs")
  # Without counters libFuzzer would guess blindly and never fail.
  if ((status == 0 && runs > 0 && ${covered:-0} > 1)); then
    echo "$summary"
    passed=$((passed + 1))
    continue
  fi
  failed=$((failed + 1))
  echo "$summary: FAILED (status $status)"
  grep -m1 -A3 'panicked at\|ERROR: libFuzzer' "$log" || tail -5 "$log"
  input=$(find "$found" -type f | head -1)
  if [[ -n $input ]]; then
    fuzz "$target" -minimize_crash=1 -max_total_time="$MINIMIZE_SECONDS" \
      -exact_artifact_path="$found/smallest" "$input" >>"$log" 2>&1 || true
    [[ -e $found/smallest ]] && input=$found/smallest
    echo "  input: $input"
    echo "  again: WARMPATH_FUZZ_TARGET=$target $BUILT/debug/fuzz $input"
    echo "  once mended: keep it as tests/fuzz/regressions/$target/NAME"
  fi
done
echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
