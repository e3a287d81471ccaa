#!/usr/bin/env bash
#
# Installs Dynamo into .cache/dynamo (about 750 MB) unless it is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"

if ! "$DYNAMO/bin/python" -c 'import dynamo.mocker, dynamo.frontend' 2>/dev/null; then
  rm -rf "$DYNAMO"
  python3 -m venv "$DYNAMO"
  # Without its dependencies, most of which the mocker does not need: then those
  # that it does.
  "$DYNAMO/bin/pip" install --quiet --no-deps "${DYNAMO_PACKAGES[@]}"
  "$DYNAMO/bin/pip" install --quiet "${DYNAMO_DEPENDENCIES[@]}"
fi
