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
import subprocess
import sys
import tempfile

import yaml

import gateway_xds
from chart import CONFIG, ROOT, documents, render
from report import Report
from stack import MODEL, NotUp, Stack

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
    # Deprecated in 1.40, and without a successor.
    said = [line for line in said if "capability_restriction_config" not in line]
    found = [line for line in said if "[critical]" in line or "[error]" in line or "eprecated" in line]
    return found or (said[-3:] if done.returncode else [])


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


# --- traffic -----------------------------------------------------------------

SESSIONS, TURNS = 3, 3
# What a client must not reach a worker of its choosing by: core/src/headers.rs.
SPOOFED = ("x-gateway-destination-endpoint", "x-dynamo-worker-instance-id", "x-worker-instance-id",
           "x-dynamo-dp-rank", "x-dynamo-prefill-instance-id", "x-prefiller-host-port", "x-envoy-original-dst-host",
           "target-pod", "x-warmpath-worker", "test-epp-endpoint-selection")


def check_traffic(report: Report, name: str, settings: list[str], controller, workers: str, feed: list[str],
                  arguments: argparse.Namespace) -> None:
    """Requests through an Envoy that is configured so."""
    extra = ["workers.selector.app=workers", "gateway.create=true", "filter.debug_headers=true", *settings]
    objects = render(*[part for setting in extra for part in ("--set", setting)])
    mode = next(setting.split("=")[1] for setting in settings if setting.startswith("mode="))
    try:
        with Stack(controller(objects), workers, feed, arguments.module, arguments.bin_dir, arguments.envoy,
                   is_direct=mode == "body") as stack:
            stack.warm()
            check_conversations(report, f"{name}: ", stack)
            check_spoofing(report, f"{name}: ", stack)
            check_large(report, f"{name}: ", stack)
            if mode == "body":
                check_nvext(report, f"{name}: ", stack)
            check_without_sidecar(report, f"{name}: ", stack)
    except NotUp as error:
        report.check(f"{name}: serves", False, error)


def signed(folder: pathlib.Path, name: str, san: str) -> tuple[pathlib.Path, pathlib.Path]:
    """A certificate of the CA in `folder`, which is made if it is not there, and its key."""
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=folder)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    if not (folder / "ca.crt").exists():
        openssl("req", "-x509", *key, "-subj", "/CN=ca", "-days", "1", "-out", "ca.crt", "-keyout", "ca.key")
    openssl("req", "-x509", *key, "-subj", f"/CN={name}", "-days", "1", "-addext", f"subjectAltName={san}",
            "-addext", "basicConstraints=critical,CA:FALSE", "-CA", "ca.crt", "-CAkey", "ca.key",
            "-out", f"{name}.crt", "-keyout", f"{name}.key")
    return folder / f"{name}.crt", folder / f"{name}.key"


def check_mutual_tls(report: Report, arguments: argparse.Namespace) -> None:
    """The feed over TLS on both sides, and not with a name that is not listed."""
    client_name = "spiffe://cluster.local/ns/inference/sa/inference-gateway-istio"
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        certificate, key = signed(folder, "sidecar", f"DNS:{SERVICE_FEED}")
        client, client_key = signed(folder, "gateway", f"URI:{client_name}")
        settings = {"mode": "endpoint", "workers.selector.app": "workers", "gateway.create": "true",
                    "filter.debug_headers": "true", "feed.tlsMode": "MUTUAL", "feed.caCertificates": folder / "ca.crt",
                    "feed.clientCertificate": client, "feed.privateKey": client_key}
        objects = render(*[part for item in settings.items() for part in ("--set", f"{item[0]}={item[1]}")])
        for allowed, serves in ((client_name, True), ("spiffe://cluster.local/ns/other/sa/x", False)):
            tls = {"certificate": str(certificate), "key": str(key), "client_ca": str(folder / "ca.crt"),
                   "allowed_names": [allowed]}
            try:
                with Stack(gateway_xds.istio(objects), WORKERS, [SERVICE_FEED], arguments.module,
                           arguments.bin_dir, arguments.envoy, is_direct=False, feed_tls=tls) as stack:
                    stack.warm(TLS_SECONDS_MAX)
                was_up, detail = True, ""
            except NotUp as error:
                was_up, detail = False, error
            report.check(f"istio, endpoint, mutual TLS: the feed {'comes' if serves else 'does not come'} to a gateway "
                         f"{'whose name is' if serves else 'whose name is not'} listed", was_up == serves, detail)


def check_conversations(report: Report, name: str, stack: Stack) -> None:
    """Every turn goes to the worker that holds the turns before, as predicted."""
    wrong = []
    for session in range(SESSIONS):
        messages = [{"role": "user", "content": f"Conversation {session}. " + f"Tell me of subject {session}. " * 20}]
        chosen = set()
        for turn in range(TURNS):
            answer = stack.chat(messages)
            if answer.status != 200:
                wrong.append(f"status {answer.status}: {answer.body[:200]!r}")
                break
            headers = answer.headers
            served, said = headers.get("x-engine-id"), headers.get("x-warmpath-worker")
            chosen.add(served)
            if served != f"engine-{said}":
                wrong.append(f"{served} served, worker {said} was chosen")
            predicted = int(headers.get("x-warmpath-predicted-cached-tokens", "-1"))
            usage = answer.json()["usage"].get("prompt_tokens_details") or {}
            # The last blocks of the turn before may still be on their way here.
            if headers.get("x-warmpath-reason") != "kv" or not 0 <= predicted <= usage.get("cached_tokens", 0):
                wrong.append(f"{headers.get('x-warmpath-reason')}: {predicted} predicted, {usage} reported")
            if turn and not predicted:
                wrong.append(f"turn {turn + 1} met no cache")
            messages += [answer.json()["choices"][0]["message"],
                         {"role": "user", "content": f"And turn {turn}? " * 12}]
        if len(chosen) != 1:
            wrong.append(f"session {session} went to {chosen}")
    report.none(f"{name}{SESSIONS * TURNS} turns go where they are cached", wrong)


def check_spoofing(report: Report, name: str, stack: Stack) -> None:
    """No header of a client's sends it anywhere."""
    victim = stack.engines[0]
    wrong = []
    question = [{"role": "user", "content": "What shall be cached elsewhere? " * 20}]
    first = stack.chat(question).headers.get("x-engine-id")
    values = {"x-gateway-destination-endpoint": f"127.0.0.1:{victim['port']},203.0.113.1:80",
              "x-prefiller-host-port": f"127.0.0.1:{victim['port']}"}
    for header in SPOOFED:
        for engine in range(1, len(stack.engines) + 1):
            answer = stack.chat(question, {header: values.get(header, str(engine))})
            told = answer.headers.get("x-engine-told", "")
            if answer.status != 200 or answer.headers.get("x-engine-id") != first or "203.0.113" in told:
                wrong.append(f"{header}: {answer.status} by {answer.headers.get('x-engine-id')}, not {first}")
    report.none(f"{name}{len(SPOOFED)} headers of a client's choose nothing", wrong)


def check_large(report: Report, name: str, stack: Stack) -> None:
    """A prompt above a gateway's default buffer of 1 MiB."""
    answer = stack.chat([{"role": "user", "content": "A long prompt, again and again. " * 50_000}])
    # The simulated engine takes no more tokens than its model does, and says so.
    told = answer.headers.get("x-warmpath-reason")
    report.check(f"{name}a body of 1.6 MB is not refused by the gateway", answer.status in (200, 400) and told,
                 f"{answer.status} {told} {answer.body[:200]!r}")


def check_nvext(report: Report, name: str, stack: Stack) -> None:
    """Mode body: the frontend is told in the body, and nothing else is lost of it."""
    stack.chat([{"role": "user", "content": "Which of you is it? " * 10}], user="somebody",
               nvext={"backend_instance_id": 99, "extra_fields": ["worker_id"]})
    seen = [each for frontend in stack.frontends for each in frontend.seen][-1:]
    bodies = [each["body"] for frontend in stack.frontends for each in frontend.seen
              if each["body"].get("user") == "somebody"]
    report.check(f"{name}the body keeps what it had", len(bodies) == 1 and bodies[0]["model"] == MODEL,
                 bodies or seen)
    refused = [each for frontend in stack.frontends for each in frontend.seen
               if "content-length" in each["headers"] and each["headers"].get("transfer-encoding")]
    report.none(f"{name}no request has two lengths", refused)


def check_without_sidecar(report: Report, name: str, stack: Stack) -> None:
    """The gateway goes on without the sidecar."""
    stack.end("sidecar")
    wrong = []
    for at in range(10):
        answer = stack.chat([{"role": "user", "content": f"Question {at} without a sidecar. " * 10}],
                            {"x-gateway-destination-endpoint": "203.0.113.1:80"})
        if answer.status != 200:
            wrong.append(f"{answer.status} {answer.body[:200]!r}")
    report.none(f"{name}serves on without the sidecar", wrong)


OWN_FEED = "warmpath_feed"
ISTIO_FEED = "outbound|9010||warmpath-sidecar.inference.svc.cluster.local"
SERVICE_FEED = "warmpath-sidecar.inference.svc.cluster.local"
RUNS = [
    ("istio, endpoint", ["mode=endpoint"], gateway_xds.istio, WORKERS, [SERVICE_FEED]),
    ("istio, endpoint, sidecar in the gateway", ["mode=endpoint", "sidecar.placement=gateway"],
     gateway_xds.istio, WORKERS, [OWN_FEED]),
    ("istio, body, WasmPlugin", ["mode=body"], gateway_xds.istio, WORKERS, [SERVICE_FEED]),
    ("istio, body, TrafficExtension", ["mode=body", "module.resource=TrafficExtension"], gateway_xds.istio,
     WORKERS, [SERVICE_FEED]),
    ("envoy gateway, endpoint", ["mode=endpoint", "gateway.provider=envoy-gateway"], gateway_xds.envoy_gateway,
     ROUTE, [SERVICE_FEED]),
    ("istio, buffer", ["mode=buffer"], gateway_xds.istio, WORKERS, [SERVICE_FEED]),
    ("istio, endpoint, Istio's cluster of the feed", ["mode=endpoint", "feed.cluster=service"],
     gateway_xds.istio, WORKERS, [ISTIO_FEED]),
]
# How long the feed may take to come over TLS.
TLS_SECONDS_MAX = 15


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
    for run in RUNS:
        check_traffic(report, *run, arguments)
    # A tree whose sidecar has no TLS yet has nothing to check here.
    if (ROOT / "control-sidecar" / "src" / "config" / "feed.rs").exists():
        check_mutual_tls(report, arguments)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
