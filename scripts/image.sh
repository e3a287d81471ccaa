#!/usr/bin/env bash
#
# The built module as an OCI image, with its bill of materials:
# `scripts/image.sh [hf]`. No container engine is needed.
#
#   target/image/warmpath            image layout, tag = version: the image, and
#                                    the bill as an artifact that refers to it
#   target/image/warmpath.cdx.json   that bill
#   target/image/warmpath-sidecar.cdx.json  the sidecar's
#
# With `hf` the module that has Hugging Face's engine: warmpath-hf. IMAGE_SOURCE
# (where the sources are) and SOURCE_DATE_EPOCH go into the image if they are set, and
# change its digest. The same module gives the same digest; the last line is
# LAYOUT:TAG DIGEST.
#
# What is written is looked at before it is called done: the bill against what
# the compiler built, the module inside against the one outside, and the image
# with skopeo and umoci where they are.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

case ${1:-} in
  '') name=warmpath bill=module ;;
  hf) name=warmpath-hf bill=module-hf ;;
  *)
    echo "usage: ${0##*/} [hf]" >&2
    exit 2
    ;;
esac
module=target/$name.wasm
layout=target/image/$name

if ! python=$(find_python); then
  echo 'error: no Python that reads TOML; see: make doctor' >&2
  exit 1
fi
# By their status: in a pipeline or a condition it would be lost.
"$python" scripts/sbom.py "$bill" --check "target/$name.crates.json"
"$python" scripts/sbom.py "$bill" "$layout.cdx.json" --file "$module"
"$python" scripts/sbom.py sidecar target/image/warmpath-sidecar.cdx.json

version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"$/\1/p' Cargo.toml)
arguments=(--version "$version" --sbom "$layout.cdx.json")
# A commit says nothing of what was not committed.
if git diff --quiet HEAD 2>/dev/null; then
  arguments+=(--revision "$(git rev-parse HEAD)")
fi
if [[ -n ${IMAGE_SOURCE:-} ]]; then
  arguments+=(--source "$IMAGE_SOURCE")
fi
digest=$("$python" scripts/oci_image.py "$module" "$layout" "${arguments[@]}")

differs() {
  echo "error: $1 finds another module in the image" >&2
  exit 1
}
"$python" scripts/oci_image.py --extract "$layout" "$version" | cmp - "$module" || differs 'our own reader'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for tool in skopeo umoci; do
  command -v "$tool" >/dev/null || echo "not looked at with $tool: it is not here; make doctor"
done
if command -v skopeo >/dev/null; then
  seen=$(skopeo inspect --format '{{.Digest}}' "oci:$layout:$version")
  [[ $seen == "$digest" ]] || differs "skopeo ($seen)"
fi
if command -v umoci >/dev/null; then
  umoci --log error unpack --rootless --image "$layout:$version" "$folder/bundle"
  cmp "$folder/bundle/rootfs/plugin.wasm" "$module" || differs umoci
fi
echo "$layout:$version $digest"
