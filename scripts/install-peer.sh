#!/usr/bin/env bash
#
# Installs a router from PyPI to be measured against, `.cache/peers/NAME`, unless it is
# there: `scripts/install-peer.sh NAME PACKAGE PROGRAM`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"

environment=$ROOT/.cache/peers/$1
if [[ ! -x $environment/bin/$3 ]]; then
  echo "installing $2"
  rm -rf "$environment"
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet "$2"
fi
