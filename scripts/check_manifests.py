"""Checks every file under envoy-config/ as far as it can be without a cluster.

    python3 scripts/check_manifests.py

- Envoy bootstraps (envoy*.yaml): filled by fill.sh with sample values, the
  built module among them, and read by the real Envoy (`--mode validate`),
  which refuses unknown fields and builds all filters.
- Feed clusters (feed/*.yaml): each in the place of envoy.yaml's, read in the same
  way, with the files of feed/sds/ filled.
- Other YAML files: they parse, no key occurs twice, and what is meant for
  Kubernetes has `apiVersion`, `kind`, `metadata.name` and `spec`, or what the
  kind has in its place. `make test-mesh` checks it against schemas.
- What docker-compose.yaml mounts exists, or is made by the build.

Prints one line per file; the last line counts files.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "envoy-config"
MODULE = ROOT / "target" / "warmpath.wasm"
SECONDS_MAX = 120
SAMPLE = {
    "GATEWAY_ADDRESS": "127.0.0.1", "GATEWAY_PORT": "10000", "ADMIN_PORT": "9901",
    "FEED_PORT": "9010", "PICKER_PORT": "9002", "WORKER_1_PORT": "19001", "WORKER_2_PORT": "19002",
    "WORKER_3_PORT": "19003", "WASM_FILE": str(MODULE), "DEBUG_HEADERS": "true",
}
# What every feed cluster in place of the bootstrap's begins with.
FEED_CLUSTER = "  - name: warmpath_feed\n"
# Written by the build, not committed.
MADE = ("../target/",)
# What takes the place of `spec` in kinds that have none.
BODY = {"ConfigMap": "data", "ServiceAccount": None, "Role": "rules", "RoleBinding": "subjects"}
# Envoy says what is wrong in lines of these levels.
COMPLAINT = re.compile(r"\[(?:critical|error)\]")


class Strict(yaml.SafeLoader):
    """Refuses a mapping that names a key twice; YAML itself takes the last."""


def mapping(loader: Strict, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # `<<: *anchor`, which may be repeated below
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key twice: {key}", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)


def fill(path: pathlib.Path, to: pathlib.Path, values: dict[str, str]) -> str:
    """Fills a template; what is wrong with it, or nothing."""
    filled = subprocess.run(
        ["sh", str(FOLDER / "fill.sh"), str(path)], env={**os.environ, **values},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    to.write_text(filled.stdout)
    return filled.stderr.strip() if filled.returncode else ""


def with_feed(bootstrap: str, cluster: str) -> str:
    """A bootstrap with another feed cluster in place of its own, which is its last."""
    return bootstrap.split(FEED_CLUSTER)[0] + FEED_CLUSTER + cluster.split(FEED_CLUSTER)[1]


def feed_faults(path: pathlib.Path) -> list[str]:
    """What Envoy finds wrong with a feed cluster."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        values = SAMPLE | {
            "FEED_FILES": name, "FEED_NAME": "spiffe://cluster.local/ns/inference/sa/sidecar",
            "FEED_SOCKET": f"{name}/feed.sock",
        }
        for secret in (path.parent / "sds").glob("*.yaml"):
            if wrong := fill(secret, folder / secret.name, values):
                return [wrong]
        whole = folder / "whole.yaml"
        whole.write_text(with_feed((FOLDER / "envoy.yaml").read_text(), path.read_text()))
        return bootstrap_faults(whole, values)


def bootstrap_faults(path: pathlib.Path, values: dict[str, str]) -> list[str]:
    """What Envoy finds wrong with a bootstrap."""
    envoy = os.environ.get("ENVOY") or str(ROOT / ".venv" / "bin" / "envoy")
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / "envoy.yaml"
        if wrong := fill(path, config, values):
            return [wrong]
        try:
            checked = subprocess.run(
                [envoy, "--mode", "validate", "--log-level", "error", "-c", str(config)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS_MAX,
            )
        except OSError as error:
            return [f"Envoy cannot be started: {error.strerror}"]
        except subprocess.TimeoutExpired:
            return [f"Envoy did not finish in {SECONDS_MAX} s"]
    complaints = [line for line in checked.stdout.splitlines() if COMPLAINT.search(line)]
    if checked.returncode or complaints:
        return complaints or checked.stdout.splitlines()[-3:]
    return []


def document_faults(document: object) -> list[str]:
    """What is wrong with one Kubernetes object."""
    if not isinstance(document, dict):
        return ["not an object"]
    body = BODY.get(document.get("kind"), "spec")
    wanted = [key for key in ("apiVersion", "kind", body) if key]
    faults = [f"no {key}" for key in wanted if not document.get(key)]
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not metadata.get("name"):
        faults.append("no metadata.name")
    return faults


def compose_faults(compose: dict) -> list[str]:
    """Which mounted files of a docker-compose file are missing."""
    faults = []
    for name, service in compose.get("services", {}).items():
        for volume in service.get("volumes", []):
            # `${NAME:-default}:inside:ro`, or the same without a variable.
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            if source in compose.get("volumes", {}):
                continue
            if not source.startswith(MADE) and not (FOLDER / source).exists():
                faults.append(f"{name} mounts {source}, which does not exist")
    return faults


def faults(path: pathlib.Path) -> list[str]:
    """Everything wrong with one file."""
    if path.name.startswith("envoy") and path.parent == FOLDER:
        return bootstrap_faults(path, SAMPLE)
    if path.parent == FOLDER / "feed":
        return feed_faults(path)
    try:
        documents = [each for each in yaml.load_all(path.read_text(), Strict) if each is not None]
    except yaml.YAMLError as error:
        return [" ".join(str(error).split())]
    if not documents:
        return ["empty"]
    if path.name.startswith("docker-compose"):
        return compose_faults(documents[0])
    if path.parent.name == "kubernetes" or path.name == "workers.yaml" and path.parent.parent.name == "recipes":
        return [fault for document in documents for fault in document_faults(document)]
    return []


def main() -> int:
    # A chart's templates are no YAML before they are rendered.
    paths = [path for path in sorted(FOLDER.rglob("*.yaml")) if "templates" not in path.parts]
    failed = 0
    for path in paths:
        found = faults(path)
        failed += bool(found)
        print(f"{'FAILED' if found else 'ok    '} {path.relative_to(ROOT)}")
        for fault in found:
            print(f"         {fault}")
    print(f"{len(paths) - failed} passed, {failed} failed")
    return 1 if failed or not paths else 0


if __name__ == "__main__":
    sys.exit(main())
