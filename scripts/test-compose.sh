#!/usr/bin/env bash
#
# The compose deployment, run natively: `scripts/test-compose.sh [--bin-dir DIR]`. Checks the
# compose file with Docker Compose, rules and configuration with promtool, then runs every
# command of the README's part on Docker Compose, and asks a real Prometheus for what rules and
# dashboard name. The module must have been built, and the programs are built unless
# DIR has them. The last line is `N passed, N failed`.
#
# The services listen on all interfaces, as in containers, so everything runs where
# there is only the loopback interface.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

die() {
  echo "error: $*" >&2
  echo '0 passed, 1 failed'
  exit 1
}

for program in promtool prometheus curl unshare; do
  command -v "$program" >/dev/null || die "no $program; see: make doctor"
done
python=$(find_python) || die 'no Python that reads YAML; see: make doctor'
DOCKER_COMPOSE=$(find_compose) || die 'no Docker Compose; see: make doctor'
envoy=$(find_envoy) || die 'no Envoy; see: make doctor'

if [[ ${1:-} == --bin-dir ]]; then
  programs=$(realpath "$2")
else
  built=$(mktemp)
  trap 'rm -f "$built"' EXIT
  cargo build --workspace --bins --locked --message-format=json-render-diagnostics >"$built"
  programs=$(sed -n 's|.*"executable":"\([^"]*\)/warmpath-sidecar".*|\1|p' "$built")
  rm -f "$built"
fi
# Services find their programs by name.
export DOCKER_COMPOSE
export PATH="$programs:$(dirname "$envoy"):$PATH"
exec scripts/isolated.sh "$python" scripts/test_compose.py
