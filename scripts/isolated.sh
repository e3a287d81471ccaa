#!/usr/bin/env bash
#
# Runs a program where there is no network but the loopback interface, because some
# of what it starts listens on all interfaces: `scripts/isolated.sh PROGRAM ...`. Needs
# root, or a kernel that gives users namespaces of their own.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 1
}

for program in unshare ip; do
  command -v "$program" >/dev/null || die "no $program; see: make doctor"
done
namespace=(unshare --net)
[[ $(id -u) == 0 ]] || namespace=(unshare --net --map-root-user)
"${namespace[@]}" true 2>/dev/null || die 'no network namespace can be made here'
exec "${namespace[@]}" bash -c 'ip link set lo up && exec "$0" "$@"' "$@"
