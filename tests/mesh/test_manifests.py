"""Manifests: everything that is meant for a cluster is what an API server takes.

    python tests/mesh/test_manifests.py [--sidecar FILE]

Checked are the manifests in envoy-config/kubernetes/, the recipes with what
the chart makes of their values, and every combination of mode, gateway and
placement that the chart knows: against schemas, rules and the syntax of names
(schema.py), and whether what they name is there (references.py). The sidecar's
configurations are read by the sidecar itself. Broken manifests must be refused;
they are planted here.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import pathlib
import re
import subprocess
import sys
import tempfile

import yaml

import references
from chart import CONFIG, ROOT, documents, helm, in_namespace, recipes, render
from report import Report
from schema import Schemas

# What must be there before: the platform's, or made by a command of the guide.
SECRETS = ("hf-token-secret", "warmpath-feed-tls")
SIDECAR_SECONDS_MAX = 20


def workers(namespace: str) -> list[dict]:
    """Stand-ins for what the user brings: the engines' pods, and secrets."""
    labels = {"app": "workers"}
    container = {"name": "engine", "image": "engine:1", "ports": [{"name": "http", "containerPort": 8000}]}
    deployment = {
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "workers", "namespace": namespace},
        "spec": {"selector": {"matchLabels": labels},
                 "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}}},
    }
    secrets = [{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}}
               for name in SECRETS]
    return [deployment, *secrets]


def everything_wrong(schemas: Schemas, objects: list[dict], stand_ins: list[dict]) -> list[str]:
    """What is wrong with objects by themselves and together."""
    found = []
    names = set()
    for document in objects:
        metadata = document["metadata"]
        name = (document["apiVersion"], document["kind"], metadata.get("namespace"), metadata["name"])
        if name in names:
            found.append(f"twice: {name}")
        names.add(name)
        found += [f"{document['kind']} {metadata['name']}: {why}" for why in schemas.faults(document)]
        for pod in overlay_pods(document):
            found += [f"{document['kind']} {metadata['name']}: {why}" for why in schemas.faults(pod)]
    return found + references.faults(objects + stand_ins)


def overlay_pods(document: dict) -> list[dict]:
    """What is laid over a gateway's Deployment, as a Deployment that can be checked."""
    is_overlay = document["kind"] == "EnvoyProxy" or "deployment" in (document.get("data") or {})
    if not is_overlay:
        return []
    labels = {"app": "gateway"}
    deployment = references.overlay(document)
    template = deployment["spec"]["template"]
    template.setdefault("metadata", {})["labels"] = labels
    deployment["spec"]["selector"] = {"matchLabels": labels}
    return [{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "overlay"}, **deployment}]


def check_plain(report: Report, schemas: Schemas) -> None:
    """The rendered manifests."""
    for path in sorted((CONFIG / "kubernetes").glob("*.yaml")):
        objects = documents(path.read_text())
        spaces = {d["metadata"].get("namespace", "inference") for d in objects} | {"llama"}
        stand_ins = [each for namespace in spaces for each in workers(namespace)]
        report.none(f"{path.relative_to(ROOT)}: {len(objects)} objects",
                    everything_wrong(schemas, objects, stand_ins))
        for document in objects:
            check_hardened(report, path.name, document)


def check_hardened(report: Report, name: str, document: dict) -> None:
    """Our pods run with no more rights than they need."""
    for deployment in [document, *overlay_pods(document)]:
        if deployment["kind"] != "Deployment":
            continue
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            if container["name"] != "warmpath-sidecar":
                continue
            context = container.get("securityContext", {})
            missing = [what for what, holds in {
                "runAsNonRoot": context.get("runAsNonRoot") is True,
                "readOnlyRootFilesystem": context.get("readOnlyRootFilesystem") is True,
                "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
                "drop ALL": context.get("capabilities", {}).get("drop") == ["ALL"],
                "seccomp": context.get("seccompProfile", {}).get("type") == "RuntimeDefault",
                "requests": bool(container.get("resources", {}).get("requests")),
                "memory limit": "memory" in container.get("resources", {}).get("limits", {}),
            }.items() if not holds]
            report.none(f"{name}: the sidecar has no more rights than it needs", missing)


def check_recipes(report: Report, schemas: Schemas) -> list[dict]:
    """Each recipe with what the chart makes of its values. Returns all objects."""
    found = []
    for folder in recipes():
        namespace = "dynamo"
        made = render("--values", str(folder / "values.yaml"), "--set", "gateway.create=true",
                      namespace=namespace)
        own = in_namespace(documents((folder / "workers.yaml").read_text()), namespace)
        stand_ins = [each for each in workers(namespace) if each["kind"] == "Secret"]
        report.none(f"{folder.relative_to(ROOT)}: {len(made)} + {len(own)} objects",
                    everything_wrong(schemas, made + own, stand_ins) + block_sizes_wrong(made, own))
        found += made
    return found


def block_sizes_wrong(made: list[dict], own: list[dict]) -> list[str]:
    """A block size that workers and sidecar do not share makes every hash wrong."""
    config = next(d for d in made if d["kind"] == "ConfigMap" and "sidecar.yaml" in d["data"])
    sizes = {model["block_size"] for model in yaml.safe_load(config["data"]["sidecar.yaml"])["models"]}
    text = yaml.safe_dump(own)
    flags = set(re.findall(r"--(?:block-size|page-size|kv-block-size)\n\s*- '?(\d+)'?", text))
    return [] if {str(size) for size in sizes} == flags else [f"block sizes: {sizes} here, {flags} there"]


def check_combinations(report: Report, schemas: Schemas) -> None:
    """Whatever the chart can be told gives objects that are right."""
    modes, providers = ("endpoint", "body", "buffer", "none"), ("istio", "envoy-gateway")
    for mode, provider, placement in itertools.product(modes, providers, ("deployment", "gateway")):
        settings = {
            "mode": mode, "gateway.provider": provider, "sidecar.placement": placement,
            "gateway.create": "true", "workers.selector.app": "workers", "pool.create": "true",
            "serviceMonitor.enabled": "true", "networkPolicy.workers.enabled": "true",
            "gateway.serviceAccount": "envoy-inference-gateway-01234567" if provider != "istio" else "",
            "networkPolicy.gatewayPodNamespace": "envoy-gateway-system" if provider != "istio" else "",
        }
        arguments = [part for item in settings.items() for part in ("--set", "=".join(item))]
        if provider == "envoy-gateway":
            arguments += ["--set-json", 'networkPolicy.gatewaySelector='
                          '{"gateway.envoyproxy.io/owning-gateway-name":"inference-gateway"}']
        objects = render(*arguments)
        report.none(f"chart: {mode}, {provider}, {placement}",
                    everything_wrong(schemas, objects, workers("inference")))


def check_refused_values(report: Report) -> None:
    """Values that cannot work are refused before anything is applied."""
    right = ("--set", "workers.selector.app=workers")
    for setting, expected in {
        "mode=endpint": "mode",
        "sidecar.placment=gateway": "placment",
        "module.digest=latest": "digest",
        "filter.feed_cluster=x": "filter",
        "feed.tlsMode=ISTIO_MUTUAL": "meshInjection",
        "feed.tlsMode=MUTUAL": "clientCertificate",
        "feed.tlsMode=SIMPLE": "caCertificates",
        "sidecar.statusPort=99999": "statusPort",
        "workers.selector=null": "workers.selector",
    }.items():
        done = helm("template", "x", str(CONFIG / "helm" / "warmpath"), *right, "--set", setting)
        report.check(f"chart refuses {setting}", done.returncode != 0 and expected in done.stderr,
                     done.stderr[-300:])


def check_planted(report: Report, schemas: Schemas) -> None:
    """Broken manifests fail."""
    def planted(name: str, kind: str, path: str, value: object, expected: str,
                of: str = "istio-endpoint.yaml") -> None:
        objects = documents((CONFIG / "kubernetes" / of).read_text())
        spaces = {d["metadata"].get("namespace") for d in objects}
        target = next(d for d in objects if d["kind"] == kind)
        parts = [int(part) if part.isdigit() else part for part in path.split("/")]
        at = target
        for part in parts[:-1]:
            at = at[part]
        at[parts[-1]] = copy.deepcopy(value)
        found = everything_wrong(schemas, objects, [w for s in spaces for w in workers(s)])
        report.check(f"refused: {name}", any(expected in why for why in found), found)

    planted("an unknown field of an EnvoyFilter", "EnvoyFilter", "spec/configPatchs", [], "configPatchs")
    planted("an unknown place to patch", "EnvoyFilter", "spec/configPatches/0/applyTo", "EXTENSION", "EXTENSION")
    planted("an unknown field of a match", "EnvoyFilter", "spec/configPatches/0/match/contxt", "GATEWAY", "contxt")
    planted("a gateway that is not there", "EnvoyFilter", "spec/targetRefs/0/name", "other", "no Gateway other")
    planted("an unknown field of a WasmPlugin", "WasmPlugin", "spec/pluginconfig", {}, "pluginconfig",
            "istio-body.yaml")
    planted("a module's address of another scheme", "WasmPlugin", "spec/url", "ftp://a/b", "url must have schem",
            "istio-body.yaml")
    planted("a feed that nobody serves", "WasmPlugin", "spec/pluginConfig/feed_cluster",
            "outbound|9010||nobody.inference.svc.cluster.local", "no Service nobody", "istio-body.yaml")
    planted("an unknown field of a TrafficExtension", "TrafficExtension", "spec/wasm/vm", {}, "vm",
            "istio-body-trafficextension.yaml")
    planted("wasm and lua at once", "TrafficExtension", "spec/lua", {"inlineCode": "x"}, "spec",
            "istio-body-trafficextension.yaml")
    planted("an unknown operation", "EnvoyPatchPolicy", "spec/jsonPatches/0/operation/op", "insert", "insert",
            "envoy-gateway-endpoint.yaml")
    planted("a listener that is not there", "EnvoyPatchPolicy", "spec/jsonPatches/0/name", "a/b/c",
            "no listener a/b/c", "envoy-gateway-endpoint.yaml")
    planted("a pool without ports", "InferencePool", "spec/targetPorts", [], "targetPorts", "istio-pool.yaml")
    planted("a pool with a port twice", "InferencePool", "spec/targetPorts", [{"number": 1}, {"number": 1}],
            "nique", "istio-pool.yaml")
    planted("a picker on a port that is not there", "InferencePool", "spec/endpointPickerRef/port/number", 9999,
            "no Service warmpath-sidecar with port 9999", "endpoint-picker.yaml")
    planted("a route to a port that is not there", "HTTPRoute", "spec/rules/0/backendRefs/0/port", 81, "with port 81")
    planted("an unknown field of a route", "HTTPRoute", "spec/rules/0/timeout", "0s", "timeout")
    planted("a time that is none", "HTTPRoute", "spec/rules/0/timeouts/request", "soon", "soon")
    planted("a grant for another namespace", "ReferenceGrant", "spec/from/0/namespace", "other",
            "no ReferenceGrant", "istio-mutual-tls.yaml")
    planted("a gateway that takes no foreign routes", "Gateway",
            "spec/listeners/0/allowedRoutes/namespaces/from", "Same", "takes no routes", "istio-mutual-tls.yaml")
    planted("parameters that are not there", "Gateway", "spec/infrastructure/parametersRef/name", "other",
            "no ConfigMap other", "istio-endpoint-container.yaml")
    planted("an unknown TLS mode", "DestinationRule", "spec/trafficPolicy/portLevelSettings/0/tls/mode", "TLS",
            "TLS", "istio-mutual-tls.yaml")
    planted("an unknown field of a Deployment", "Deployment", "spec/template/spec/containers/0/imagePolicy", "x",
            "imagePolicy")
    planted("a probe of a port that is not there", "Deployment",
            "spec/template/spec/containers/0/livenessProbe/httpGet/port", "metrics", "names port metrics")
    planted("an account that is not there", "Deployment", "spec/template/spec/serviceAccountName", "other",
            "no ServiceAccount other")
    planted("a volume that is not there", "Deployment", "spec/template/spec/volumes/0/configMap/name", "other",
            "no ConfigMap other")
    planted("a selector that finds nothing", "PodDisruptionBudget", "spec/selector/matchLabels", {"a": "b"},
            "selects no pod")
    planted("a policy for a port that is not there", "NetworkPolicy", "spec/ingress/0/ports/0/port", "feed",
            "port feed")
    planted("a monitor of a port that is not there", "ServiceMonitor", "spec/endpoints/0/port", "metrics",
            "no Service has a port metrics")
    planted("a time that is none", "ServiceMonitor", "spec/endpoints/0/interval", "often", "often")
    planted("a feed's port that Istio takes for HTTP/1", "Service", "spec/ports/0",
            {"name": "tcp-feed", "port": 9010, "targetPort": "grpc-feed"}, "not known as HTTP/2",
            "istio-destination-rule.yaml")
    planted("a name that is none", "Service", "metadata/name", "Warmpath_Sidecar", "not a name")
    planted("a label that is none", "Service", "metadata/labels/app", "a b", "not a label's value")
    graph = next(d for f in recipes() for d in documents((f / "workers.yaml").read_text())
                 if d["kind"] == "DynamoGraphDeployment")
    for name, change, expected in [
        ("a frontend sidecar that is not there", {"frontendSidecar": "other"}, "frontendSidecar"),
        ("a picker beside the gateway", {"type": "epp"}, "endpoint picker"),
        ("an unknown field of a graph's component", {"routerMode": "kv"}, "routerMode"),
        ("an unknown field of a graph's pod", {"podTemplate": {"spec": {"container": []}}}, "container"),
    ]:
        broken = copy.deepcopy(graph)
        broken["spec"]["components"][0].update(change)
        found = schemas.faults(broken)
        report.check(f"refused: {name}", any(expected in why for why in found), found)


def check_stripped(report: Report) -> None:
    """The proxy removes every name that the filter removes."""
    source = (ROOT / "core" / "src" / "headers.rs").read_text()
    named = dict(re.findall(r'pub const (\w+): &str = "([^"]+)";', source))
    body = re.search(r"pub const STRIPPED: \[&str; \d+\] = \[(.*?)\];", source, re.DOTALL)[1]
    words = re.findall(r'"([^"]+)"|^\s*([A-Z_]+),', body, re.MULTILINE)
    wanted = {text or named[name] for text, name in words}
    for of in ("istio-endpoint.yaml", "istio-body.yaml", "istio-buffer.yaml", "envoy-gateway-endpoint.yaml",
               "envoy-gateway-body.yaml"):
        text = (CONFIG / "kubernetes" / of).read_text()
        removed = set(re.findall(r"^\s*- remove: (\S+)$", text, re.MULTILINE))
        report.none(f"{of} removes what core/src/headers.rs lists ({len(wanted)})",
                    sorted(wanted ^ removed))


def check_capabilities(report: Report) -> None:
    """The proxy grants the module what the plain bootstrap grants it."""
    def granted(path: pathlib.Path) -> set[str]:
        found = re.search(r"allowed_capabilities:(.*?)vm_config", path.read_text(), re.DOTALL)
        return set(re.findall(r"\w+(?=: \{\})", found[1])) if found else set()

    own, plain = granted(CONFIG / "kubernetes" / "istio-endpoint.yaml"), granted(CONFIG / "envoy.yaml")
    report.check(f"the chart grants the module {len(own)} host calls, as envoy.yaml does",
                 bool(own) and own == (plain or own), sorted(own ^ plain))


def check_sidecar(report: Report, sidecar: pathlib.Path, objects: list[dict]) -> None:
    """The sidecar takes its configurations."""
    maps = {yaml.safe_dump(d["data"]["sidecar.yaml"]): d["data"]["sidecar.yaml"] for d in objects
            if d["kind"] == "ConfigMap" and "sidecar.yaml" in d["data"]}
    for at, text in enumerate(maps.values()):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "sidecar.yaml"
            path.write_text(text)
            done = subprocess.run(
                [str(sidecar), "--config", str(path), "--check-config"], capture_output=True, text=True,
                timeout=SIDECAR_SECONDS_MAX, env={"POD_NAMESPACE": "inference", "PATH": "/usr/bin"})
        report.check(f"warmpath-sidecar takes configuration {at + 1} of {len(maps)}", done.returncode == 0,
                     done.stderr[-400:] + text)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sidecar", type=pathlib.Path, help="warmpath-sidecar, to read its configurations")
    arguments = parser.parse_args()
    report, schemas = Report(), Schemas()
    check_plain(report, schemas)
    of_recipes = check_recipes(report, schemas)
    check_combinations(report, schemas)
    check_refused_values(report)
    check_planted(report, schemas)
    check_stripped(report)
    check_capabilities(report)
    if arguments.sidecar:
        plain = [d for p in sorted((CONFIG / "kubernetes").glob("*.yaml")) for d in documents(p.read_text())]
        check_sidecar(report, arguments.sidecar, plain + of_recipes)
    report.none("no rule of a schema was left out", sorted(schemas.skipped))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
