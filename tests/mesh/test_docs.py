"""Docs: every command of the Kubernetes pages is run.

    python tests/mesh/test_docs.py --module FILE --bin-dir DIR [--envoy FILE]

`sh` blocks of a page run one after the other in one shell, with the real
kubectl and Helm against the stand-in API server (apiserver.py). Where a page
forwards a port of the gateway or of the sidecar, an Envoy and a sidecar answer
that run here with the configuration that the page installs. The migration page
must name every variable that the sidecar knows, under what is true of it. Every
manifest goes through `kubectl apply --dry-run=server`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import gateway_xds
from apiserver import ApiServer
from chart import CONFIG, HELM, KUBECTL, ROOT, recipes, render
from report import Report
from schema import Schemas
from stack import NotUp, Stack

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGE_SECONDS_MAX = 240
KUBECTL_SECONDS_MAX = 60
RECIPE = CONFIG / "recipes" / "qwen3-0.6b-vllm-agg"
RECIPE_MODEL = "Qwen/Qwen3-0.6B"
# What a page calls the ports that it forwards.
GATEWAY_PORT, STATUS_PORT = "8080", "9011"

# Stands before kubectl: ports need no forwarding here.
SHIM = """#!/bin/sh
for word in "$@"; do
  [ "$word" = port-forward ] && exec sleep {seconds}
done
exec {kubectl} "$@"
"""


def run_page(report: Report, page: pathlib.Path, stack: Stack, schemas: Schemas) -> None:
    """Runs a page's blocks; each that came to its end passes."""
    blocks = BLOCK.findall(page.read_text())
    script = "set -euo pipefail\n"
    for at, block in enumerate(blocks, start=1):
        block = re.sub(rf"localhost:{GATEWAY_PORT}\b", f"localhost:{stack.port}", block)
        block = re.sub(rf"localhost:{STATUS_PORT}\b", f"localhost:{stack.status}", block)
        script += f"{block}\necho; echo '@@ end of block {at}'\n"
    with ApiServer(schemas) as server, tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "config").write_text(server.kubeconfig())
        tools = folder / "bin"
        tools.mkdir()
        (tools / "kubectl").write_text(SHIM.format(seconds=PAGE_SECONDS_MAX, kubectl=KUBECTL))
        (tools / "kubectl").chmod(0o755)
        (tools / "helm").symlink_to(HELM)
        environment = {**os.environ, "KUBECONFIG": str(folder / "config"), "HOME": str(folder),
                       "PATH": f"{tools}:{os.environ['PATH']}"}
        with (folder / "said").open("w+") as said:
            shell = subprocess.Popen(["bash", "-c", script], cwd=ROOT, env=environment, stdout=said,
                                     stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                status = shell.wait(PAGE_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                status = None
            # Forwarded ports, still "open".
            try:
                os.killpg(shell.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            shell.wait()
            said.seek(0)
            output = said.read()
        left = [f"{kind} {name}" for _, kind, namespace, name in server.store.objects
                if namespace not in (None, "default") and kind != "Secret"]
    for at, block in enumerate(blocks, start=1):
        ended = f"@@ end of block {at}\n" in output
        first = block.strip().splitlines()[0]
        report.check(f"{page.relative_to(ROOT)}: {first[:90]}", ended, output[-1500:])
        if not ended:
            break
    report.check(f"{page.relative_to(ROOT)}: ends well", status == 0, status)
    report.none(f"{page.relative_to(ROOT)}: uninstalling leaves nothing", left)


def check_dry_runs(report: Report, schemas: Schemas) -> None:
    """`kubectl apply --dry-run=server` takes every manifest, and a broken one not."""
    with ApiServer(schemas) as server, tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "config").write_text(server.kubeconfig())
        environment = {**os.environ, "KUBECONFIG": str(folder / "config"), "HOME": str(folder)}

        def kubectl(*arguments: str) -> subprocess.CompletedProcess:
            return subprocess.run([str(KUBECTL), *arguments], env=environment, cwd=ROOT, capture_output=True,
                                  text=True, timeout=KUBECTL_SECONDS_MAX)

        for namespace in ("inference", "gateways", "routes", "llama", "envoy-gateway-system", "dynamo"):
            kubectl("create", "namespace", namespace)
        plain = sorted((CONFIG / "kubernetes").glob("*.yaml"))
        for path in [*plain, *(each / "workers.yaml" for each in recipes())]:
            # Objects without a namespace of their own are a recipe's.
            more = ("--namespace", "dynamo") if path.name == "workers.yaml" else ()
            done = kubectl("apply", "--dry-run=server", *more, "--filename", str(path))
            report.check(f"kubectl applies {path.relative_to(ROOT)}", done.returncode == 0, done.stderr[-600:])
        broken = folder / "broken.yaml"
        broken.write_text((CONFIG / "kubernetes" / "istio-endpoint.yaml").read_text().replace(
            "applyTo: LISTENER", "applyto: LISTENER"))
        done = kubectl("apply", "--dry-run=server", "--filename", str(broken))
        report.check("kubectl refuses a misspelt field", done.returncode != 0 and "applyto" in done.stderr,
                     done.stderr[-600:])
        stored = [key for key in server.store.objects if key[1] != "Namespace"]
        report.none("dry runs store nothing", [str(key) for key in stored])


def check_variables(report: Report, page: pathlib.Path) -> None:
    """What the page says of each variable is what the sidecar's code says."""
    text = page.read_text()
    sources = ROOT / "control-sidecar" / "src" / "config"
    variables = (sources / "router" / "variables.rs").read_text()
    fields = dict(re.findall(r'field\(\s*"(\w+)",\s*"(\w+)",?\s*\)', variables))
    others = re.findall(r'other\(\s*"(\w+)"', variables)
    elsewhere = re.findall(r'elsewhere\("(\w+)"', variables)
    discovery = set()
    for path in (sources / "discovery.rs", sources / "replicas.rs"):
        discovery |= set(re.findall(r'get\("(\w+)"\)', path.read_text()))

    def section(heading: str) -> str:
        return re.search(rf"^### {heading}$(.*?)(?=^##)", text, re.DOTALL | re.MULTILINE)[1]

    same, only = section("Same name, same meaning"), section("Taken at one value only")
    ignored, unread = section("Warned about, without effect"), section("Not read")
    rows = [line for line in same.splitlines() if line.startswith("| `")]
    wrong = [f"{name} is {field}" for name, field in fields.items()
             if not any(f"`{name}`" in row and f"`{field}`" in row for row in rows)
             and name not in ("DYN_OVERLAP_SCORE_WEIGHT", "DYN_ROUTER_KV_OVERLAP_SCORE_WEIGHT")]
    wrong += [f"{name} is missing" for name in elsewhere if f"`{name}`" not in same]
    wrong += [f"{name} is missing" for name in discovery
              if f"`{name}`" not in same and not name.startswith("ETCD_AUTH")]
    rules = {name: re.search(rf'other\(\s*"{name}",\s*(?:(\w+)\b|Rule::(\w+))', variables) for name in others}
    for name, rule in rules.items():
        constant = rule[1] if rule[1] != "Rule" else None
        kind = re.search(rf"const {constant}: Rule =\s*Rule::(\w+)", variables)[1] if constant else \
            re.search(rf'"{name}",\s*Rule::(\w+)', variables)[1]
        if f"`{name}`" not in (only if kind == "Only" else ignored):
            wrong.append(f"{name} is of {kind}")
    report.none(f"{page.relative_to(ROOT)} says of {len(fields) + len(others)} variables what is true", wrong)
    code = "".join(path.read_text() for path in (ROOT / "control-sidecar" / "src").rglob("*.rs"))
    claimed = [name for name in re.findall(r"`(DYN_\w+)`", unread) if f'"{name}"' in code]
    report.none(f"{page.relative_to(ROOT)}: what is not read is not read", claimed)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--module", type=pathlib.Path, default=ROOT / "target" / "warmpath.wasm")
    parser.add_argument("--bin-dir", type=pathlib.Path, default=ROOT / "target" / "debug")
    parser.add_argument("--envoy", default=str(ROOT / ".venv" / "bin" / "envoy"))
    arguments = parser.parse_args()
    report = Report()
    objects = render("--values", str(RECIPE / "values.yaml"), "--set", "gateway.create=true",
                     "--set", "filter.debug_headers=true", namespace="dynamo")
    try:
        with Stack(gateway_xds.istio(objects), "outbound|8000||qwen3-0-6b-agg.dynamo.svc.cluster.local",
                   ["warmpath-sidecar.dynamo.svc.cluster.local"], arguments.module, arguments.bin_dir,
                   arguments.envoy, is_direct=False, model=RECIPE_MODEL,
                   host="qwen3-0-6b-agg.example.com") as stack:
            stack.warm()
            run_page(report, CONFIG / "kubernetes" / "README.md", stack, Schemas())
    except NotUp as error:
        report.check("a gateway for the pages", False, error)
    check_dry_runs(report, Schemas())
    check_variables(report, CONFIG / "migrate-from-dynamo-epp.md")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
