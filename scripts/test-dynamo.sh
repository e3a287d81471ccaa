#!/usr/bin/env bash
#
# Envoy with Warmpath in front of real Dynamo workers and frontends:
# `scripts/test-dynamo.sh [options of warmpath-run dynamo]`. Installs Dynamo into
# .cache/dynamo (about 750 MB) unless it is there. The last line is
# `N passed, N failed`.
#
# Dynamo's mocked workers listen on all interfaces, so everything runs in a
# network namespace that has nothing but the loopback interface. That needs root,
# or a kernel that gives users namespaces of their own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

die() {
  echo "error: $*" >&2
  echo '0 passed, 1 failed'
  exit 1
}

for program in etcd nats-server unshare ip; do
  command -v "$program" >/dev/null || die "no $program; see: make doctor"
done

namespace=(unshare --net)
[[ $(id -u) == 0 ]] || namespace=(unshare --net --map-root-user)
"${namespace[@]}" true 2>/dev/null || die 'no network namespace can be made here'

python=$DYNAMO/bin/python
scripts/install-dynamo.sh

inside='ip link set lo up && exec scripts/stack.sh dynamo --python "$0" "$@"'
exec "${namespace[@]}" bash -c "$inside" "$python" "$@"
