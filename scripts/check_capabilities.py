"""Checks what Envoy lets the module do: exactly what it does, no more.

    python3 scripts/check_capabilities.py MODULE

The SDK makes a module import host functions that ours never calls. Every
`capability_restriction_config` under envoy-config/ must list, and no other:

- the functions that filter/src/host.rs declares, and the one that it calls
  through the SDK; each of them must be imported by the module,
- the callbacks that the filter answers, below; each must be exported by it.

A bootstrap must have a list for each of its VMs. Prints one line per file; the last
line counts them.
"""

from __future__ import annotations

import pathlib
import re
import sys

import check_module

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "envoy-config"
HOST_FILE = ROOT / "filter" / "src" / "host.rs"
DECLARED = re.compile(r"pub\(super\) fn (\w+)\(")
# Called by `proxy_wasm::hostcalls::open_grpc_stream`.
THROUGH_SDK = {"proxy_grpc_stream"}
CALLBACKS = {f"proxy_on_{name}" for name in (
    "configure", "context_create", "delete", "done", "grpc_close", "grpc_receive", "log",
    "queue_ready", "request_body", "request_headers", "request_trailers", "response_body",
    "response_headers", "response_trailers", "tick", "vm_start",
)}
RUNTIME = "envoy.wasm.runtime.v8"
LIST = re.compile(r"allowed_capabilities:\s*(\{(?:[^{}]|\{\})*\}|(?:\s+\w+: \{\}\s*\n)+)")
NAME = re.compile(r"(\w+): \{\}")


def wanted() -> set[str]:
    """Everything that the filter asks of Envoy, and answers to."""
    return set(DECLARED.findall(HOST_FILE.read_text())) | THROUGH_SDK | CALLBACKS


def lists(text: str) -> list[list[str]]:
    """The names in every list of a file."""
    return [NAME.findall(found) for found in LIST.findall(text)]


def file_faults(text: str, names: set[str], is_bootstrap: bool) -> list[str]:
    """What is wrong with the lists of a file that configures the filter."""
    found = lists(text)
    faults = []
    if is_bootstrap and len(found) != text.count(RUNTIME):
        faults.append(f"{text.count(RUNTIME)} VMs, {len(found)} lists of capabilities")
    for listed in found:
        faults += [f"not listed: {name}" for name in sorted(names - set(listed))]
        faults += [f"listed, not needed: {name}" for name in sorted(set(listed) - names)]
        if len(set(listed)) != len(listed):
            faults.append("a name twice")
    return faults


def module_faults(data: bytes, names: set[str]) -> list[str]:
    """What the filter needs and the module has not."""
    parts = dict(check_module.sections(data))
    has = {name.split(".")[-1] for name in check_module.imports(parts.get("import", b"\0"))}
    has |= check_module.exports(parts.get("export", b"\0"))
    return [f"the module lacks {name}" for name in sorted(names - has)]


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: check_capabilities.py MODULE", file=sys.stderr)
        return 2
    names = wanted()
    module = pathlib.Path(sys.argv[1])
    try:
        results = {module.name: module_faults(module.read_bytes(), names)}
    except (OSError, check_module.Malformed) as error:
        results = {module.name: [f"cannot be read: {error}"]}
    for path in sorted(FOLDER.rglob("*.yaml")):
        text = path.read_text()
        is_bootstrap = path.parent == FOLDER and RUNTIME in text
        if is_bootstrap or lists(text):
            faults = file_faults(text, names, is_bootstrap)
            results[str(path.relative_to(ROOT))] = faults
    failed = 0
    for name, faults in results.items():
        failed += bool(faults)
        print(f"{'FAILED' if faults else 'ok    '} {name}")
        for fault in faults:
            print(f"         {fault}")
    print(f"{len(names)} capabilities")
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed or len(results) < 2 else 0


if __name__ == "__main__":
    sys.exit(main())
