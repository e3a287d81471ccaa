"""Checks that the documents name only what exists.

    python3 scripts/check_docs.py

A guide that names files long gone misleads more than no guide. In every
committed Markdown file this checks

- links to files, relative to the document,
- `paths` in backticks that begin with a folder of the repository, or end like
  a source file; a `*` in them matches as in a shell,
- `make target` in backticks and in code blocks.

What a build or `make setup` makes (target/, .venv/, .cache/) need not exist.
Prints each wrong name; the last line counts names.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Changes are told as they were made: a file named there may be gone by now.
HISTORY = {"CHANGELOG.md"}
MADE = ("target/", ".venv/", ".cache/")
SOURCE_ENDINGS = (".md", ".proto", ".py", ".rs", ".sh", ".toml", ".yaml", ".yml")

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
SPAN = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)+/?")
MAKE = re.compile(r"(?:^|&& |\$ )make((?: [a-z][a-z0-9-]*)+)(?= *(?:$|[#`&]| [A-Z]+=))", re.MULTILINE)


def committed(pattern: str) -> list[pathlib.Path]:
    """Files that git knows (or would add), matching a git path pattern."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", pattern],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    ).stdout
    return [ROOT / line for line in listed.splitlines() if (ROOT / line).is_file()]


def targets() -> set[str]:
    """The targets of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][a-z0-9-]*):", text, re.MULTILINE))


def is_path(text: str, folders: set[str]) -> bool:
    """Whether a span in backticks means a file of the repository."""
    if not PATH.fullmatch(text) or text.startswith(MADE):
        return False
    return text.split("/")[0] in folders or text.endswith(SOURCE_ENDINGS)


def exists(base: pathlib.Path, name: str) -> bool:
    """Whether a path, perhaps with `*`, is there."""
    name = name.rstrip("/")
    return any(True for _ in base.glob(name)) if "*" in name else (base / name).exists()


def names(document: pathlib.Path, folders: set[str]):
    """Yields `(name, there)` for each thing that a document names."""
    text = document.read_text()
    known = targets()
    for link in LINK.findall(text):
        if "://" not in link and not link.startswith("mailto:"):
            yield f"link {link}", (document.parent / link).exists()
    blocks = "\n".join(BLOCK.findall(text))
    spans = SPAN.findall(BLOCK.sub("", text))
    for span in spans:
        if is_path(span, folders):
            yield f"path {span}", exists(ROOT, span) or exists(document.parent, span)
    for command in [*spans, *blocks.splitlines()]:
        for match in MAKE.finditer(command.strip()):
            for target in match[1].split():
                yield f"make {target}", target in known


def main() -> int:
    folders = {path.relative_to(ROOT).parts[0] for path in committed("*/*")}
    checked = failed = 0
    for document in committed("*.md"):
        if document.name in HISTORY:
            continue
        for name, there in names(document, folders):
            checked += 1
            if not there:
                failed += 1
                print(f"FAILED {document.relative_to(ROOT)}: no such {name}")
    print(f"{checked} names checked")
    print(f"{checked - failed} passed, {failed} failed")
    return 1 if failed or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
