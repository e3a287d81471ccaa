#!/usr/bin/env bash
#
# What the mesh's gateways, Kubernetes and Helm make of our manifests: a list of
# steps, each of which prints `N passed, N failed` last. All run; the last line
# adds them up. Some eight minutes after the builds. Both modules must have been built.
#
#   scripts/test-mesh.sh [STEP ...]
#
# Overrides (environment):
#   WARMPATH_BIN_DIR  folder of warmpath-sidecar and engine-sim, which are not built then
#   WARMPATH_MODULE   the module, [target/warmpath.wasm]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"
cd "$ROOT"

# --- steps -----------------------------------------------------------------

STEPS=(rendered manifests envoy docs spoof secure ext_proc)

step_rendered() {
  local failed=0
  "$MESH/bin/helm" lint --quiet envoy-config/helm/warmpath --set workers.selector.app=workers || failed=1
  scripts/render-manifests.sh --check || failed=$((failed + 1))
  echo "$((2 - failed)) passed, $failed failed"
}

step_manifests() { mesh_python test_manifests.py --sidecar "$BIN_DIR/warmpath-sidecar"; }

step_envoy() { mesh_python test_envoy.py "${STACK[@]}"; }

step_docs() { mesh_python test_docs.py "${STACK[@]}"; }

step_spoof() { scripts/stack.sh spoof --wasm "$MODULE"; }

step_secure() { scripts/test-secure.sh; }

step_ext_proc() { scripts/test-ext-proc.sh; }

# --- running them ----------------------------------------------------------

MINUTES_MAX=10
export WARMPATH_MESH=$MESH

mesh_python() {
  local program=$1
  shift
  timeout "${MINUTES_MAX}m" "$MESH/venv/bin/python" "tests/mesh/$program" "$@"
}

scripts/fetch-mesh-tools.sh
if ! ENVOY=$(find_envoy); then
  echo 'error: no Envoy; see: make doctor' >&2
  exit 1
fi
if [[ -n ${WARMPATH_BIN_DIR:-} ]]; then
  BIN_DIR=$WARMPATH_BIN_DIR
else
  # As scripts/stack.sh does, so that nothing is built twice.
  executables=$(mktemp)
  trap 'rm -f "$executables"' EXIT
  cargo build --workspace --bins --locked --message-format=json-render-diagnostics >"$executables"
  BIN_DIR=$(dirname "$(sed -n 's|.*"executable":"\([^"]*/warmpath-sidecar\)".*|\1|p' "$executables")")
fi
MODULE=${WARMPATH_MODULE:-$ROOT/target/warmpath.wasm}
STACK=(--module "$MODULE" --bin-dir "$BIN_DIR" --envoy "$ENVOY")

[[ $# == 0 ]] || STEPS=("$@")
passed=0
failed=0
output=$(mktemp)
trap 'rm -f "$output" "${executables:-}"' EXIT
for step in "${STEPS[@]}"; do
  printf '\n=== mesh: %s\n' "$step"
  status=0
  "step_$step" 2>&1 | tee "$output" || status=$?
  if [[ $(tail -n 1 "$output") =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed$ ]]; then
    passed=$((passed + BASH_REMATCH[1]))
    failed=$((failed + BASH_REMATCH[2]))
    if ((status != 0 && BASH_REMATCH[2] == 0)); then
      failed=$((failed + 1))
    fi
  else
    echo "the step $step printed no count"
    failed=$((failed + 1))
  fi
done
echo "$passed passed, $failed failed"
((failed == 0 && passed > 0))
