"""Writes a bill of materials, CycloneDX 1.6: what is inside a program of ours.

    python3 scripts/sbom.py module OUT [--file target/warmpath.wasm]
    python3 scripts/sbom.py module-hf OUT [--file target/warmpath-hf.wasm]
    python3 scripts/sbom.py sidecar OUT
    python3 scripts/sbom.py module --check target/warmpath.crates.json

Inside is what is linked: normal dependencies of this one program, with its own
features and for its own target; no macros, no build scripts, and nothing that
only another crate of the workspace turns on. `cargo tree` knows that, and is
asked with the build's own toolchain and target. (`cargo metadata`, and the
tools that are made of it such as cargo-cyclonedx, add up the features of the whole
workspace: for the module they name seven crates more, and the folder they ran in.)
Versions and checksums are Cargo.lock's, licences what the crates state. Rust's
standard library is a component as well, of the toolchain's version.

The same sources give the same bytes: no time, and the serial number comes from
the content.

`--check` compares with what the compiler said it built for the target
(build-module.sh keeps that): each crate in the one must be in the other. What
belongs to the standard library is told by its own lock file. The last line
is `N passed, N failed`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import uuid
try:
    import tomllib
except ImportError:  # Python before 3.11
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
# How the lock file names the public registry.
REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"
# One line of `cargo tree --prefix depth`: depth, name, version, licence.
LINE = re.compile(r"(\d+) (\S+) v(\S+)(?: \([^|]*\))?\|([^|]*?)(?: \(\*\))?")
STANDARD_LIBRARY = "rust-standard-library"
# Folder of the module's target in the path of what is built for it.
FOR_MODULE = "/wasm-target/"
NOT_LINKED = {"proc-macro", "custom-build"}


@dataclasses.dataclass(frozen=True)
class Program:
    """What a bill is written for."""

    package: str
    name: str
    description: str
    tree: list[str]
    """Command that prints the tree of what is linked."""
    for_module: bool
    """Whether the toolchain is the module's, and not the user's own."""


def tree_command(cargo: list[str], package: str, *more: str) -> list[str]:
    return [*cargo, "tree", "--package", package, "--edges", "normal,no-proc-macro",
            "--prefix", "depth", "--format", " {p}|{l}", *more]


WASM_CARGO = ["scripts/wasm-cargo.sh"]
PROGRAMS = {
    "module": Program(
        "warmpath-filter", "warmpath", "Proxy-wasm filter of Warmpath",
        tree_command(WASM_CARGO, "warmpath-filter"), True),
    "module-hf": Program(
        "warmpath-filter", "warmpath-hf",
        "Proxy-wasm filter of Warmpath, with Hugging Face's tokenizer engine",
        tree_command(WASM_CARGO, "warmpath-filter", "--features", "hf-tokenizers"), True),
    "sidecar": Program(
        "warmpath-sidecar", "warmpath-sidecar", "Native sidecar of Warmpath",
        tree_command(["cargo"], "warmpath-sidecar", "--locked",
                     "--target", "x86_64-unknown-linux-gnu"), False),
}


class Wrong(Exception):
    """Something cannot be told for sure."""


def tree(text: str) -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], set]]:
    """Licences by crate, and crates by the crate that links them.

    A crate that comes again has its own crates told only the first time.
    """
    licences: dict[tuple[str, str], str] = {}
    edges: dict[tuple[str, str], set] = {}
    path: list[tuple[str, str]] = []
    for line in text.splitlines():
        if not line.strip():
            continue
        match = LINE.fullmatch(line)
        if not match:
            raise Wrong(f"cargo tree: not understood: {line}")
        depth, crate = int(match[1]), (match[2], match[3])
        if crate not in licences and not match[4]:
            raise Wrong(f"{crate[0]} {crate[1]} states no licence")
        licences.setdefault(crate, match[4].replace("/", " OR "))
        edges.setdefault(crate, set())
        del path[depth:]
        if path:
            edges[path[-1]].add(crate)
        path.append(crate)
    return licences, edges


def lock(path: pathlib.Path) -> dict[tuple[str, str], dict]:
    """The packages of a lock file."""
    packages = tomllib.loads(path.read_text())["package"]
    return {(package["name"], package["version"]): package for package in packages}


def ref(crate: tuple[str, str]) -> str:
    return f"{crate[0]}@{crate[1]}"


def component(crate: tuple[str, str], licence: str, package: dict) -> dict:
    """A crate as CycloneDX has it."""
    source = package.get("source")
    if source not in (None, REGISTRY):
        raise Wrong(f"{ref(crate)} is from {source}")
    # A crate of the workspace is in no registry.
    kind = "cargo" if source else "generic"
    known = {
        "type": "library",
        "bom-ref": ref(crate),
        "name": crate[0],
        "version": crate[1],
        "purl": f"pkg:{kind}/{crate[0]}@{crate[1].replace('+', '%2B')}",
        "licenses": [{"expression": licence}],
    }
    if source:
        known["hashes"] = [{"alg": "SHA-256", "content": package["checksum"]}]
    return known


def bill(program: Program, text: str, locked: dict, rust: str, file: bytes | None) -> dict:
    """The bill of a program.

    - `text`: what `cargo tree` printed.
    - `rust`: version of the toolchain, for the standard library.
    - `file`: the program itself, whose digest is then in the bill.
    """
    licences, edges = tree(text)
    top = [crate for crate in licences if crate[0] == program.package]
    if len(top) != 1:
        raise Wrong(f"cargo tree names {program.package} {len(top)} times")
    missing = [ref(crate) for crate in licences if crate not in locked]
    if missing:
        raise Wrong(f"not in Cargo.lock: {', '.join(missing)}")
    root = {
        "type": "application",
        "bom-ref": ref(top[0]),
        "name": program.name,
        "description": program.description,
        "version": top[0][1],
        "purl": f"pkg:generic/{program.name}@{top[0][1]}",
        "licenses": [{"expression": licences[top[0]]}],
    }
    if file is not None:
        root["hashes"] = [{"alg": "SHA-256", "content": hashlib.sha256(file).hexdigest()}]
    components = [
        component(crate, licences[crate], locked[crate])
        for crate in sorted(licences) if crate != top[0]
    ]
    dependencies = [
        {"ref": ref(crate), "dependsOn": sorted(ref(each) for each in edges[crate])}
        for crate in sorted(edges)
    ]
    components.append({
        "type": "library",
        "bom-ref": STANDARD_LIBRARY,
        "name": STANDARD_LIBRARY,
        "description": "With the crates of its own lock file",
        "version": rust,
        "purl": f"pkg:github/rust-lang/rust@{rust}",
        "licenses": [{"expression": "MIT OR Apache-2.0"}],
    })
    for each in dependencies:
        each["dependsOn"].append(STANDARD_LIBRARY)
    dependencies.append({"ref": STANDARD_LIBRARY})
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": root,
            "tools": {"components": [{"type": "application", "name": "scripts/sbom.py"}]},
        },
        "components": components,
        "dependencies": dependencies,
    }
    content = json.dumps(document, sort_keys=True)
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}"
    return document


def output_of(command: list[str]) -> str:
    """What a command prints, run in the repository."""
    environment = {**os.environ, "CARGO_TERM_COLOR": "never"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Wrong(f"{command[0]} {command[1]} ended with status {done.returncode}")
    return done.stdout


def sysroot() -> pathlib.Path:
    """The toolchain of the module."""
    command = "source scripts/toolchain.sh && find_wasm_sysroot"
    return pathlib.Path(output_of(["bash", "-c", command]).strip())


def rust_version(program: Program) -> str:
    """Version of the standard library that a program is linked with."""
    rustc = str(sysroot() / "bin" / "rustc") if program.for_module else "rustc"
    return output_of([rustc, "--version"]).split()[1]


def built(messages: str) -> set[tuple[str, str, bool]]:
    """What cargo said it built for the module's target.

    Name, version, and whether it is a folder of the toolchain.
    """
    found = set()
    for line in messages.splitlines():
        message = json.loads(line)
        if message.get("reason") != "compiler-artifact":
            continue
        if NOT_LINKED & set(message["target"]["kind"]):
            continue
        if not any(FOR_MODULE in name for name in message["filenames"]):
            continue
        # `SOURCE#NAME@VERSION`, or `SOURCE/NAME#VERSION` of a folder.
        source, _, named = message["package_id"].rpartition("#")
        name, _, version = named.rpartition("@")
        found.add((name or source.rpartition("/")[2], version, "/rustlib/src/rust/" in source))
    return found


def differences(document: dict, made: set[tuple[str, str, bool]], standard: set) -> list[str]:
    """What is in the bill or in the program, and not in both.

    - `standard`: names and versions in the standard library's own lock file.
    """
    listed = {
        (each["name"], each["version"]) for each in document["components"]
        if each["bom-ref"] != STANDARD_LIBRARY
    }
    name, _, version = document["metadata"]["component"]["bom-ref"].rpartition("@")
    listed.add((name, version))
    own = {(name, version) for name, version, toolchain in made if not toolchain}
    return [
        *(f"in the bill and not built: {ref(each)}" for each in sorted(listed - own)),
        *(f"built and not in the bill: {ref(each)}" for each in sorted(own - listed - standard)),
    ]


def check(program: Program, messages: pathlib.Path) -> int:
    """Compares the bill with a build; prints the counts."""
    document = bill(program, output_of(program.tree), lock(ROOT / "Cargo.lock"),
                    rust_version(program), None)
    made = built(messages.read_text())
    library = lock(sysroot() / "lib/rustlib/src/rust/library/Cargo.lock")
    wrong = differences(document, made, set(library))
    for line in wrong:
        print(f"FAILED {line}")
    right = len(document["components"]) - sum(line.startswith("in") for line in wrong)
    print(f"{len(document['components'])} components, {len(made)} crates built")
    print(f"{max(right, 0)} passed, {len(wrong)} failed")
    return 1 if wrong or not made else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="A bill of materials of a program of ours.")
    parser.add_argument("program", choices=sorted(PROGRAMS))
    parser.add_argument("out", nargs="?", type=pathlib.Path)
    parser.add_argument("--file", type=pathlib.Path)
    parser.add_argument("--check", type=pathlib.Path, metavar="CRATES")
    options = parser.parse_args()
    program = PROGRAMS[options.program]
    try:
        if options.check:
            return check(program, options.check)
        if not options.out:
            parser.error("where to?")
        file = options.file.read_bytes() if options.file else None
        document = bill(program, output_of(program.tree), lock(ROOT / "Cargo.lock"),
                        rust_version(program), file)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")
    except (Wrong, OSError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        if options.check:
            print("0 passed, 1 failed")
        return 1
    print(f"{len(document['components'])} components in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
