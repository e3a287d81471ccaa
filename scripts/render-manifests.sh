#!/usr/bin/env bash
#
# Renders the chart with each file of envoy-config/kubernetes/values/ into
# envoy-config/kubernetes/, and the sidecar's rights alone into rbac.yaml there.
#
#   scripts/render-manifests.sh           writes
#   scripts/render-manifests.sh --check   says what is out of date; changes nothing
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"
scripts/fetch-mesh-tools.sh

CHART=envoy-config/helm/warmpath
FOLDER=envoy-config/kubernetes

rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT
# Renders into the file $1: a first line of our own, then the chart with $2...
render() {
  local file=$1 of=$2
  shift 2
  {
    echo "# Rendered from $CHART with $of: change those, then run"
    echo '# scripts/render-manifests.sh.'
    "$MESH/bin/helm" template warmpath "$CHART" --namespace inference --kube-version 1.33.0 "$@" |
      sed -e '/^# Source: /d' -e '/app.kubernetes.io\/managed-by: Helm/d' -e '1{/^---$/d}' | cat -s
  } >"$rendered/$file"
}
for values in "$FOLDER"/values/*.yaml; do
  render "$(basename "$values")" "values/$(basename "$values")" --values "$values"
done
render rbac.yaml 'its defaults' --set workers.selector.app=workers \
  --show-only templates/serviceaccount.yaml --show-only templates/rbac.yaml

status=0
for file in "$rendered"/*; do
  target="$FOLDER/$(basename "$file")"
  if [[ ${1:-} == --check ]]; then
    if ! diff -u "$target" "$file" >"$rendered/diff" 2>&1; then
      echo "FAILED $target is out of date; run scripts/render-manifests.sh"
      head -n 20 "$rendered/diff"
      status=1
    fi
    rm -f "$rendered/diff"
  else
    cp "$file" "$target"
  fi
done
exit "$status"
