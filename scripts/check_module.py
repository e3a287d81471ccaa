"""Checks a built module: what it imports, how large it is, what it tells.

    python3 scripts/check_module.py MODULE [--code-bytes-max N]

A proxy-wasm host offers functions named `env.proxy_*` and refuses a module
that imports anything else, but only when Envoy loads it; this check says so
at build time. The code section is bounded because Envoy compiles all of it
on its main thread at start, about 1.2 s per MB. No path of the machine that
built the module may be in it.

Prints the figures and one line per check; the last line counts them. The
exit status is 0 only if none failed.

Reads the binary format's sections itself (WebAssembly core specification,
chapter 5): magic and version, then `id: u8, size: u32 LEB128, bytes`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Functions that the host may be asked for.
IMPORT_PATTERN = re.compile(r"env\.proxy_[a-z_]+")
# Further imports, each with the reason why it cannot be avoided. None yet.
IMPORTS_ALLOWED: dict[str, str] = {
    "wasi_snapshot_preview1.clock_time_get": (
        "part of the proxy-wasm ABI (0.2.1 takes it from WASI): its only monotonic clock, and "
        "leases and bookings must not expire when the wall clock jumps"
    ),
}
# Texts of the hooks that tests have in a module of their own
# (filter/src/hooks.rs).
TEST_HOOKS = (b"crashing on request", b"test_ring_reader")
# Functions without which Envoy does not accept a module as a filter.
EXPORTS_REQUIRED = {
    "_initialize|_start",
    "memory",
    "proxy_abi_version_0_2_1",
    "proxy_on_context_create",
    "proxy_on_memory_allocate|malloc",
    "proxy_on_request_headers",
}
# Pages of 64 KiB: Envoy instantiates at most 1 GiB.
MEMORY_PAGES_MAX = 16384

SECTIONS = [
    "custom", "type", "import", "function", "table", "memory", "global",
    "export", "start", "element", "code", "data", "data count", "tag",
]
EXTERNAL_KINDS = ["function", "table", "memory", "global", "tag"]


class Malformed(Exception):
    """The bytes are not a module."""


class Reader:
    """A cursor over bytes that refuses to read beyond their end."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    def done(self) -> bool:
        return self.at == len(self.data)

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise Malformed(f"{count} bytes wanted at {self.at}, too few left")
        self.at += count
        return self.data[self.at - count : self.at]

    def u8(self) -> int:
        return self.take(1)[0]

    def u32(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.u8()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise Malformed(f"number too long at {self.at}")

    def name(self) -> str:
        return self.take(self.u32()).decode("utf-8")

    def limits(self) -> tuple[int, int | None]:
        flags = self.u8()
        least = self.u32()
        return least, self.u32() if flags & 1 else None


def sections(data: bytes):
    """Yields `(name, bytes)` for each section of a module."""
    reader = Reader(data)
    if reader.take(4) != b"\0asm" or reader.take(4) != b"\1\0\0\0":
        raise Malformed("neither magic nor version of a WebAssembly module")
    while not reader.done():
        number = reader.u8()
        content = reader.take(reader.u32())
        yield SECTIONS[number] if number < len(SECTIONS) else f"unknown {number}", content


def imports(content: bytes) -> list[str]:
    """The import section's entries as `module.name`, non-functions marked."""
    reader = Reader(content)
    found = []
    for _ in range(reader.u32()):
        name = f"{reader.name()}.{reader.name()}"
        kind = reader.u8()
        if kind == 0:
            reader.u32()
        elif kind == 1:
            reader.u8(), reader.limits()
        elif kind == 2:
            reader.limits()
        elif kind in (3, 4):
            reader.u8(), reader.u8()
        else:
            raise Malformed(f"import of unknown kind {kind}")
        found.append(name if kind == 0 else f"{name} ({EXTERNAL_KINDS[kind]})")
    return found


def exports(content: bytes) -> set[str]:
    """The names that the export section offers."""
    reader = Reader(content)
    found = set()
    for _ in range(reader.u32()):
        found.add(reader.name())
        reader.u8(), reader.u32()
    return found


def machine_paths() -> list[str]:
    """Folders of this machine that a module must not mention."""
    home = os.path.expanduser("~")
    folders = {
        str(ROOT),
        home,
        os.environ.get("CARGO_HOME", os.path.join(home, ".cargo")),
        os.environ.get("RUSTUP_HOME", os.path.join(home, ".rustup")),
        "/root", "/home", "/Users", "/usr/src", "/usr/lib/rustlib",
    }
    return sorted(folder.rstrip("/") + "/" for folder in folders if folder not in ("", "/"))


def check(data: bytes, code_bytes_max: int) -> list[tuple[bool, str]]:
    """Runs all checks; one `(passed, sentence)` each."""
    parts: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for name, content in sections(data):
        parts.setdefault(name, content)
        sizes[name] = sizes.get(name, 0) + len(content)
    print(f"sections, bytes: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}")

    imported = imports(parts.get("import", b"\0"))
    print(f"imports, {len(imported)}: {', '.join(sorted(imported))}")
    foreign = [
        name for name in imported
        if not IMPORT_PATTERN.fullmatch(name) and name not in IMPORTS_ALLOWED
    ]
    for name in imported:
        if name in IMPORTS_ALLOWED:
            print(f"allowed import {name}: {IMPORTS_ALLOWED[name]}")

    exported = exports(parts.get("export", b"\0"))
    missing = [
        names for names in sorted(EXPORTS_REQUIRED)
        if not any(name in exported for name in names.split("|"))
    ]

    memory = Reader(parts.get("memory", b"\0"))
    pages = memory.limits()[0] if memory.u32() else 0

    hooks = [hook.decode() for hook in TEST_HOOKS if hook in data]
    told = [folder for folder in machine_paths() if folder.encode() in data]
    code = sizes.get("code", 0)
    return [
        (bool(imported) and not foreign,
         f"imports only proxy-wasm host functions{': also ' + ', '.join(foreign) if foreign else ''}"),
        (not missing,
         f"exports what the host calls{': not ' + ', '.join(missing) if missing else ''}"),
        (0 < code <= code_bytes_max,
         f"code section {code:,} of at most {code_bytes_max:,} bytes"),
        (0 < pages <= MEMORY_PAGES_MAX,
         f"initial memory {pages} of at most {MEMORY_PAGES_MAX} pages"),
        (not hooks,
         f"has no hooks of tests{': ' + ', '.join(hooks) if hooks else ''}"),
        (not told,
         f"tells no path of the build machine{': ' + ', '.join(told) if told else ''}"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", type=pathlib.Path)
    parser.add_argument("--code-bytes-max", type=int, default=1_250_000)
    arguments = parser.parse_args()

    print(f"module {arguments.module}")
    try:
        results = check(arguments.module.read_bytes(), arguments.code_bytes_max)
    except (OSError, Malformed, UnicodeDecodeError) as error:
        results = [(False, f"can be read: {error}")]
    for passed, sentence in results:
        print(f"{'ok    ' if passed else 'FAILED'} {sentence}")
    failed = sum(not passed for passed, _ in results)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
