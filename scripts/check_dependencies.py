"""Checks licences and sources of every dependency against deny.toml.

    python3 scripts/check_dependencies.py

deny.toml is written for `cargo deny`, which `make check` also runs where it is
installed. This script needs nothing but Python and cargo, so that the policy
is enforced on every machine. It reads the part of the policy that can be
decided from `cargo metadata` and refuses keys it does not know, lest a rule
be written down and not enforced:

- `licenses.allow`, `licenses.exceptions` (crate, allow, reason)
- `bans.deny` (crate, reason), `bans.wildcards`
- `sources.unknown-registry`, `sources.unknown-git`

Prints each violation; the last line counts crates.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
try:
    import tomllib
except ImportError:  # Python before 3.11
    import tomli as tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
# How cargo names the public registry in a lock file.
REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"
KNOWN_KEYS = {
    # `all-features` is how this script asks cargo, too.
    "graph": {"all-features"},
    "licenses": {"allow", "exceptions", "private", "confidence-threshold"},
    # Versions side by side cost build time, not safety: left to cargo deny.
    "bans": {"deny", "wildcards", "allow-wildcard-paths", "multiple-versions"},
    "sources": {"unknown-registry", "unknown-git"},
}


def satisfied(expression: str, allowed: set[str]) -> bool:
    """Whether an SPDX expression can be met with allowed licences alone.

    `A OR B` needs one, `A AND B` both; AND binds tighter. `A WITH e` is one
    licence, `A/B` the old way to write `A OR B`.
    """
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))
    at = 0

    def term() -> bool:
        nonlocal at
        token = tokens[at]
        at += 1
        if token == "(":
            value = alternatives()
            if tokens[at] != ")":
                raise ValueError(expression)
            at += 1
            return value
        if at + 1 < len(tokens) and tokens[at] == "WITH":
            token = f"{token} WITH {tokens[at + 1]}"
            at += 2
        return token in allowed

    def conjunction() -> bool:
        nonlocal at
        value = term()
        while at < len(tokens) and tokens[at] == "AND":
            at += 1
            value = term() and value
        return value

    def alternatives() -> bool:
        nonlocal at
        value = conjunction()
        while at < len(tokens) and tokens[at] == "OR":
            at += 1
            value = conjunction() or value
        return value

    try:
        value = alternatives()
    except IndexError:
        raise ValueError(expression) from None
    if at != len(tokens):
        raise ValueError(expression)
    return value


def unknown_keys(policy: dict) -> list[str]:
    """Keys of the policy that this script would not enforce."""
    found = []
    for section, content in policy.items():
        if section not in KNOWN_KEYS:
            found.append(section)
            continue
        found += [f"{section}.{key}" for key in content if key not in KNOWN_KEYS[section]]
    return found


def violations(package: dict, policy: dict) -> list[str]:
    """What is wrong with one dependency."""
    found = []
    licences = set(policy["licenses"]["allow"])
    for exception in policy["licenses"].get("exceptions", []):
        if exception["crate"] == package["name"]:
            licences |= set(exception["allow"])
    expression = package["license"]
    try:
        if not expression:
            found.append("states no licence")
        elif not satisfied(expression, licences):
            found.append(f"licence not allowed: {expression}")
    except ValueError:
        found.append(f"licence not understood: {expression}")

    for ban in policy["bans"].get("deny", []):
        if ban["crate"] == package["name"]:
            found.append(f"banned: {ban['reason']}")

    source = package["source"]
    if source.startswith("git+") and policy["sources"]["unknown-git"] == "deny":
        found.append(f"comes from git: {source}")
    elif source != REGISTRY and policy["sources"]["unknown-registry"] == "deny":
        found.append(f"comes from an unknown registry: {source}")
    return found


def wildcards(member: dict) -> list[str]:
    """Dependencies of a workspace member that accept any version."""
    return [
        f"{member['name']}: {dependency['name']} accepts any version"
        for dependency in member["dependencies"]
        if dependency["req"] == "*" and not dependency.get("path")
    ]


def main() -> int:
    policy = tomllib.loads((ROOT / "deny.toml").read_text())
    unknown = unknown_keys(policy)
    if unknown:
        print(f"FAILED deny.toml: not enforced here: {', '.join(unknown)}")
        print("0 passed, 1 failed")
        return 1

    metadata = json.loads(subprocess.run(
        ["cargo", "metadata", "--format-version=1", "--locked", "--all-features"],
        cwd=ROOT, check=True, stdout=subprocess.PIPE,
    ).stdout)
    dependencies = [package for package in metadata["packages"] if package["source"]]
    members = [package for package in metadata["packages"] if not package["source"]]

    failed = 0
    for package in sorted(dependencies, key=lambda package: package["name"]):
        found = violations(package, policy)
        failed += bool(found)
        for violation in found:
            print(f"FAILED {package['name']} {package['version']}: {violation}")
    loose = [line for member in members for line in wildcards(member)]
    for line in loose:
        print(f"FAILED {line}")
    failed += len(loose)

    stated = {package["license"] for package in dependencies if package["license"]}
    unused = [
        licence for licence in policy["licenses"]["allow"]
        if not any(licence in expression for expression in stated)
    ]
    if unused:
        print(f"note: allowed and not used: {', '.join(unused)}")
    print(f"{len(dependencies)} crates checked: licences, sources, bans")
    passed = len(dependencies) + len(loose) - failed
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
