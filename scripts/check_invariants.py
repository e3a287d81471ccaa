"""Checks by search what ARCHITECTURE.md promises and no compiler enforces.

    python3 scripts/check_invariants.py

1. Only filter/src/host.rs makes host calls. It and filter/src/allocator.rs are
   the only files that lift the ban on unsafe code.
2. Only the filter depends on proxy-wasm.
3. The core is pure: no clock, environment, threads, files, sockets, or maps
   with a random seed; and it depends on nothing that brings them.
4. No file carries an absolute path of somebody's home folder.

Comments are not searched, nor are tests: `tests.rs`, `tests/` and what follows
`#[cfg(test)]` in a file. Prints each place; the last line counts invariants.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

HOST_FILE = "filter/src/host.rs"
ALLOCATOR_FILE = "filter/src/allocator.rs"
HOST_CALLS = re.compile(r'proxy_wasm::hostcalls|extern\s+"C"\s*\{|wasm_import_module')
UNSAFE = re.compile(r"\bunsafe\b|unsafe_code")
# `getrandom` asks a custom backend by this name; without it the module would
# import its randomness from JavaScript.
RANDOM_BACKEND = "__getrandom_v03_custom"
IMPURE = re.compile(
    r"\bstd::(?:env|fs|net|os|process|thread|time)\b"
    # The trait io::Write on a buffer is no input or output; these are.
    r"|\bio::(?:stdin|stdout|stderr)\b"
    r"|\bstd::collections::(?:\{[^}]*)?Hash(?:Map|Set)\b|\bRandomState\b"
    r"|\bthread_local!"
)
CORE_DEPENDENCIES_BANNED = {
    "chrono", "getrandom", "libc", "proxy-wasm", "rand", "rayon", "reqwest", "tokio",
}
HOME = re.compile(r"(?<![\w/])/(?:root|home/\w+|Users/\w+)/")
LINE_COMMENT = re.compile(r"^\s*//.*$|\s//\s.*$", re.MULTILINE)


def files(*patterns: str) -> list[str]:
    """Paths that git knows (or would add), relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout
    return [line for line in listed.splitlines() if (ROOT / line).is_file()]


def product_code(path: str) -> str:
    """A source file without its comments and tests; empty for a test file."""
    if path.endswith("/tests.rs") or "/tests/" in path:
        return ""
    text = (ROOT / path).read_text()
    # `#[cfg(test)]\nmod tests;` ends nothing of interest, an inline module does.
    text = re.split(r"#\[cfg\(test\)\]\s*mod \w+ \{", text)[0]
    # Comments become empty lines, so that line numbers stay right.
    return LINE_COMMENT.sub("", text)


def places(paths: list[str], pattern: re.Pattern) -> list[str]:
    """Where a pattern occurs in product code, as `path:line: match`."""
    found = []
    for path in paths:
        text = product_code(path)
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path}:{line}: {match[0]}")
    return found


def dependencies(manifest: str) -> set[str]:
    """Names of a crate's dependencies, without those for tests."""
    found: set[str] = set()
    section = ""
    for line in (ROOT / manifest).read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[] ")
        elif section.endswith("dependencies") and not section.endswith("dev-dependencies"):
            name = re.match(r"([\w-]+)\s*[.=]", line)
            if name and "optional = true" not in line:
                found.add(name[1])
    return found


def check() -> list[tuple[str, list[str]]]:
    """Each invariant with the places that break it."""
    sources = files("core/*.rs", "filter/*.rs", "control-sidecar/*.rs")
    core = [path for path in sources if path.startswith("core/src/")]
    manifests = [path for path in files("*/Cargo.toml") if path != "filter/Cargo.toml"]
    others = [path for path in sources if path != HOST_FILE]
    return [
        (f"host calls only in {HOST_FILE}", places(others, HOST_CALLS)),
        (f"unsafe code only in {HOST_FILE} and {ALLOCATOR_FILE}", [
            place for place in places([it for it in others if it != ALLOCATOR_FILE], UNSAFE)
            if RANDOM_BACKEND not in (ROOT / place.split(":")[0]).read_text()
        ]),
        ("only the filter depends on proxy-wasm", [
            manifest for manifest in manifests if "proxy-wasm" in dependencies(manifest)
        ]),
        ("the core is pure", places(core, IMPURE)),
        ("the core depends on nothing impure", sorted(
            dependencies("core/Cargo.toml") & CORE_DEPENDENCIES_BANNED
        )),
        ("no path of somebody's home folder", [
            f"{path}: {match[0]}"
            for path in files("*.rs", "*.toml", "*.yaml", "*.yml", "*.json", "*.md", "*.sh", "Makefile", ".ci/run")
            if not path.startswith(("scripts/", "tests/golden/", "tests/fixtures/"))
            for match in [HOME.search((ROOT / path).read_text(errors="replace"))] if match
        ]),
    ]


def main() -> int:
    failed = 0
    for sentence, broken in check():
        failed += bool(broken)
        print(f"{'FAILED' if broken else 'ok    '} {sentence}")
        for place in broken:
            print(f"         {place}")
    total = len(check())
    print(f"{total - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
