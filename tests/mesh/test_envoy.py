"""Envoy: takes and runs what the controllers would make of the manifests.

    python tests/mesh/test_envoy.py --module FILE --bin-dir DIR [--envoy FILE]

Every manifest in envoy-config/kubernetes/ that configures a proxy is rendered
(gateway_xds.py) and read by Envoy in `--mode validate`. Then an Envoy with it,
the sidecar and three simulated engines serve requests, mode after mode; behind
mode `body` stands what imitates a Dynamo frontend in direct mode.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile

import yaml

import gateway_xds
from chart import CONFIG, ROOT, documents, render
from report import Report


VALIDATE_SECONDS_MAX = 120
WORKERS = "outbound|8000||workers.inference.svc.cluster.local"
ROUTE = "httproute/inference/workers/rule/0"


def provider(objects: list[dict]):
    """The controller whose policies these are; none if they configure no proxy."""
    kinds = {each["kind"] for each in objects}
    if "EnvoyPatchPolicy" in kinds:
        return gateway_xds.envoy_gateway
    return gateway_xds.istio if "EnvoyFilter" in kinds else None


def certificates(folder: pathlib.Path, xds: gateway_xds.Xds) -> None:
    """A certificate in the place of those that only a gateway's pod has."""
    made = None
    for cluster in xds.clusters:
        context = cluster.get("transport_socket", {}).get("typed_config", {}).get("common_tls_context")
        if context is None:
            continue
        if made is None:
            made = folder / "certificate.pem", folder / "key.pem"
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                            "-nodes", "-subj", "/CN=test", "-days", "1", "-out", str(made[0]),
                            "-keyout", str(made[1])], check=True, capture_output=True)
        if "trusted_ca" in context["validation_context"]:
            context["validation_context"]["trusted_ca"]["filename"] = str(made[0])
        for each in context.get("tls_certificates", []):
            each["certificate_chain"]["filename"] = str(made[0])
            each["private_key"]["filename"] = str(made[1])


def complaints(envoy: str, bootstrap: dict, folder: pathlib.Path) -> list[str]:
    """What Envoy finds wrong with a bootstrap."""
    path = folder / "envoy.yaml"
    path.write_text(yaml.safe_dump(bootstrap))
    done = subprocess.run([envoy, "--mode", "validate", "--log-level", "warning", "-c", str(path)],
                          capture_output=True, text=True, timeout=VALIDATE_SECONDS_MAX)
    said = (done.stdout + done.stderr).splitlines()
    found = [line for line in said if "[critical]" in line or "[error]" in line or "eprecated" in line]
    return found or (said[-3:] if done.returncode else [])


def is_refused_mode(found: list[str]) -> bool:
    """Whether the module does not know the mode yet."""
    return any("`mode` must be" in line for line in found)


def check_validate(report: Report, envoy: str, module: pathlib.Path) -> None:
    """Envoy reads what every manifest makes of its configuration."""
    for path in sorted((CONFIG / "kubernetes").glob("*.yaml")):
        objects = documents(path.read_text())
        made_by = provider(objects)
        if made_by is None:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            xds = made_by(objects)
            certificates(folder, xds)
            bootstrap = gateway_xds.static(xds, folder, module, 10000, 9901, {}, discovers=False)
            report.none(f"Envoy reads {path.name}", complaints(envoy, bootstrap, folder))


def check_planted(report: Report, envoy: str, module: pathlib.Path) -> None:
    """What Envoy would refuse in a cluster is refused here."""
    def planted(name: str, settings: list[str], change, expected: str) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            arguments = [part for setting in settings for part in ("--set", setting)]
            objects = render("--set", "workers.selector.app=workers", "--set", "gateway.create=true", *arguments)
            try:
                change(objects)
                xds = gateway_xds.istio(objects)
                bootstrap = gateway_xds.static(xds, folder, module, 10000, 9901, {}, discovers=False)
                found = complaints(envoy, bootstrap, folder)
            except gateway_xds.NotKnown as error:
                found = [str(error)]
            report.check(f"refused: {name}", any(expected in line for line in found), found)

    def patches(objects: list[dict]) -> list[dict]:
        return next(d for d in objects if d["kind"] == "EnvoyFilter")["spec"]["configPatches"]

    def misspell(objects: list[dict]) -> None:
        for patch in patches(objects):
            if patch["applyTo"] == "EXTENSION_CONFIG":
                patch["patch"]["value"]["typed_config"]["config"]["allow_headers_stop"] = True

    def unpin(objects: list[dict]) -> None:
        for patch in patches(objects):
            if patch["applyTo"] == "EXTENSION_CONFIG":
                config = patch["patch"]["value"]["typed_config"]["config"]
                config["vm_config"]["code"]["remote"]["http_uri"]["uri"] = "oci://registry.example/warmpath:1"

    def elsewhere(objects: list[dict]) -> None:
        for patch in patches(objects):
            if "service" in patch.get("match", {}).get("cluster", {}):
                patch["match"]["cluster"]["portNumber"] = 1

    def other_place(objects: list[dict]) -> None:
        patches(objects)[0]["applyTo"] = "VIRTUAL_HOST"

    planted("a member of the filter's configuration that is not known", ["filter.debug_haeders=true"],
            lambda _: None, "debug_haeders")
    planted("a field of the filter that Envoy has not", [], misspell, "allow_headers_stop")
    planted("a module without its digest", [], unpin, "digest")
    planted("a patch of a cluster that is not there", [], elsewhere, "no cluster")
    planted("a place to patch that nobody knows", [], other_place, "VIRTUAL_HOST")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--module", type=pathlib.Path, default=ROOT / "target" / "warmpath.wasm")
    parser.add_argument("--bin-dir", type=pathlib.Path, default=ROOT / "target" / "debug")
    parser.add_argument("--envoy", default=str(ROOT / ".venv" / "bin" / "envoy"))
    arguments = parser.parse_args()
    report = Report()
    check_validate(report, arguments.envoy, arguments.module)
    check_planted(report, arguments.envoy, arguments.module)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
