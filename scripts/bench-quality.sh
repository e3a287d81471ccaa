#!/usr/bin/env bash
#
# Routers compared on the same requests and the same simulated engines:
# `scripts/bench-quality.sh [options of bench-quality]`. The module must have been
# built. Installs the other routers into .cache (1 GB) unless they are there.
#
#   QUALITY_TRACES=a,b    of: conversations, mooncake, hot-prefix
#   QUALITY_ROUTERS=a,b   of: round-robin, warmpath, warmpath-time, dynamo, sglang, smg,
#                         vllm-kv, vllm-text
#
# With `--offline`, policies are compared in virtual time instead, in seconds; that
# needs no router, no Envoy and no module.
#
# Some of them listen on all interfaces, so everything runs in a network namespace
# that has nothing but the loopback interface. That needs root, or a kernel that
# gives users namespaces of their own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

offline=no
[[ " $* " != *' --offline '* ]] || offline=yes

die() {
  echo "error: $*" >&2
  exit 1
}

wants() {
  [[ $offline == no ]] && [[ -z ${QUALITY_ROUTERS:-} || ,$QUALITY_ROUTERS, == *,$1,* ]]
}

! wants sglang || scripts/install-peer.sh sglang-router "$SGLANG_ROUTER_PACKAGE" sglang-router
! wants smg || scripts/install-peer.sh smg "$SMG_PACKAGE" smg
if wants vllm-kv || wants vllm-text; then
  scripts/install-peer.sh vllm-router "$VLLM_ROUTER_PACKAGE" vllm-router
fi
! wants dynamo || scripts/install-dynamo.sh

if [[ $offline == no ]]; then
  ENVOY=$(find_envoy) || die 'no Envoy; see: make doctor'
  export ENVOY
  scripts/isolated.sh true
fi

executables=$(mktemp)
trap 'rm -f "$executables"' EXIT
cargo build --release --workspace --bins --locked \
  --message-format=json-render-diagnostics >"$executables"
program=$(sed -n 's|.*"executable":"\([^"]*/bench-quality\)".*|\1|p' "$executables")
[[ -n $program ]] || die 'the build gave no bench-quality'
rm -f "$executables"
[[ $offline == no ]] || exec "$program" "$@"
exec scripts/isolated.sh "$program" "$@"
