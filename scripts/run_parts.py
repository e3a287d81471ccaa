"""Runs the parts of `make check` or `make test` and adds up their counts.

    python3 scripts/run_parts.py check|test [PART ...]

Every part runs, whatever became of the one before. Its output is shown and
kept in target/logs/. At the end comes one line per part and, last, one line
`N passed, N failed` over all; the exit status is 0 only if nothing failed.

How a part is counted:

- *cargo*: the sums of every `test result:` line of `cargo test`. A test binary
  that was started and printed no such line crashed: one failure.
- *summary*: the part's last line, `N passed, N failed`.
- *status*: the part is one check; its exit status decides.

A part that ends with another status than its counts suggest, that counts
nothing at all, or that exceeds its time limit is a failure as well: silence is
never zero failures.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGS = ROOT / "target" / "logs"

CARGO_STARTED = re.compile(r"^\s+Running .*\((.+)\)$")
CARGO_RESULT = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored;")
SUMMARY = re.compile(r"^(\d+) passed, (\d+) failed$")


@dataclasses.dataclass(frozen=True)
class Part:
    """One command of a run."""

    name: str
    command: list[str]
    count: str
    """How the output is counted: `cargo`, `summary` or `status`."""
    minutes_max: int
    """The part is ended, and failed, after this time."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    """What became of a part."""

    part: Part
    passed: int = 0
    failed: int = 0
    ignored: int = 0
    seconds: float = 0.0
    remarks: list[str] = dataclasses.field(default_factory=list)


def parts_of(run: str) -> list[Part]:
    """The parts of a run, in order: what is quick to fail comes first."""
    python = sys.executable
    # Built in the part that checks it, so that a module that no longer builds
    # fails there, and the other parts still run.
    modules = [
        Part("module",
             ["bash", "-c", f"scripts/build-module.sh && exec '{python}' "
              "scripts/check_module.py target/warmpath.wasm"], "summary", 20),
        # The variant with Hugging Face's engine carries a regex compiler; it
        # is for tokenizers that the small one refuses, at a longer start.
        Part("module-hf",
             ["bash", "-c", f"scripts/build-module.sh hf && exec '{python}' "
              "scripts/check_module.py target/warmpath-hf.wasm --code-bytes-max 4000000"],
             "summary", 20),
    ]
    if run == "check":
        return [
            Part("format", ["cargo", "fmt", "--all", "--check"], "status", 2),
            Part("invariants", [python, "scripts/check_invariants.py"], "summary", 1),
            Part("docs", [python, "scripts/check_docs.py"], "summary", 1),
            Part("dependencies", [python, "scripts/check_dependencies.py"], "summary", 5),
            Part("scripts", ["bash", "-n", *shell_scripts()], "status", 1),
            *(
                [Part("cargo-deny",
                      ["cargo", "deny", "check", "bans", "licenses", "sources"], "status", 5)]
                if shutil.which("cargo-deny") else []
            ),
            Part("clippy",
                 ["cargo", "clippy", "--workspace", "--all-targets", "--all-features", "--locked",
                  "--", "-D", "warnings"], "status", 30),
            Part("rustdoc",
                 ["cargo", "doc", "--workspace", "--no-deps", "--locked",
                  "--document-private-items"], "status", 30,
                 {"RUSTDOCFLAGS": "-D warnings"}),
            *modules,
            Part("capabilities",
                 [python, "scripts/check_capabilities.py", "target/warmpath.wasm"], "summary", 1),
            # Last: Envoy loads the module to read a bootstrap.
            Part("manifests", [python, "scripts/check_manifests.py"], "summary", 10),
        ]
    wasm_tests = ["scripts/wasm-test.sh"]
    return [
        Part("scripts", [python, "scripts/test_scripts.py"], "summary", 2),
        Part("native",
             ["cargo", "test", "--workspace", "--locked", "--no-fail-fast"], "cargo", 40),
        # Dynamo's crates are of a workspace of their own.
        Part("parity", ["make", "test-parity"], "summary", 30),
        Part("wasm", wasm_tests, "cargo", 20),
        Part("wasm-hf", [*wasm_tests, "--features", "hf-tokenizers"], "cargo", 20),
        *modules,
        Part("image",
             ["bash", "-c", "source scripts/toolchain.sh && scripts/build-module.sh && "
              f"exec '{python}' scripts/test_image.py"], "summary", 20),
        # Needs namespaces, which only Linux has.
        *(
            [Part("compose",
                  ["bash", "-c", "scripts/build-module.sh && exec scripts/test-compose.sh"],
                  "summary", 20)]
            if shutil.which("unshare") else []
        ),
        Part("smoke",
             ["bash", "-c", "scripts/build-module.sh && exec scripts/stack.sh smoke"],
             "summary", 20),
        Part("mesh",
             ["bash", "-c", "scripts/build-module.sh && scripts/build-module.sh hooks && "
              "exec scripts/test-mesh.sh"],
             "summary", 30),
        Part("fleet",
             ["bash", "-c", "scripts/build-module.sh && exec scripts/stack.sh fleet"],
             "summary", 20),
        # Its figures are not kept; right answers count.
        Part("bench",
             ["bash", "-c", f"scripts/build-module.sh && exec '{python}' scripts/bench.py run --quick"],
             "status", 20, {"WARMPATH_BENCH_PROFILE": "dev"}),
    ]


def shell_scripts() -> list[str]:
    """Every shell script of the project."""
    found = sorted(ROOT.glob("scripts/*.sh")) + [ROOT / ".ci" / "run"]
    return [str(path.relative_to(ROOT)) for path in found]


def run_part(part: Part) -> Outcome:
    """Runs one part, shows its output, and counts it."""
    outcome = Outcome(part)
    started = time.monotonic()
    lines: list[str] = []
    try:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env={**os.environ, **part.environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )
    except OSError as error:
        outcome.failed = 1
        outcome.remarks.append(f"not started: {error.strerror}")
        return outcome

    expired = threading.Event()

    def expire() -> None:
        expired.set()
        os.killpg(process.pid, signal.SIGKILL)

    limit = threading.Timer(part.minutes_max * 60, expire)
    limit.start()
    try:
        with (LOGS / f"{part.name}.log").open("w") as log:
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                log.write(line)
                lines.append(line.rstrip("\n"))
        status = process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        raise
    finally:
        limit.cancel()
    outcome.seconds = time.monotonic() - started
    if expired.is_set():
        outcome.remarks.append(f"ended after {part.minutes_max} minutes")
    count_output(outcome, lines, status)
    return outcome


def count_output(outcome: Outcome, lines: list[str], status: int) -> None:
    """Fills in the counts of a part that printed `lines` and ended with `status`."""
    if outcome.part.count == "cargo":
        count_cargo(outcome, lines)
    elif outcome.part.count == "summary":
        last = next((line for line in reversed(lines) if line.strip()), "")
        match = SUMMARY.match(last.strip())
        if match:
            outcome.passed, outcome.failed = int(match[1]), int(match[2])
        else:
            outcome.failed = 1
            outcome.remarks.append("printed no count")
    elif status == 0:
        outcome.passed = 1
    else:
        outcome.failed = 1

    if status != 0 and outcome.failed == 0:
        outcome.failed = 1
        outcome.remarks.append(f"ended with status {status}")
    if outcome.passed == 0 and outcome.failed == 0:
        outcome.failed = 1
        outcome.remarks.append("counted nothing")


def count_cargo(outcome: Outcome, lines: list[str]) -> None:
    """Adds up the test binaries of one `cargo test`."""
    running = None
    for line in lines:
        started = CARGO_STARTED.match(line)
        result = CARGO_RESULT.match(line)
        if started and running:
            outcome.failed += 1
            outcome.remarks.append(f"no result from {running}")
        if started:
            running = pathlib.Path(started[1]).name
        elif result:
            outcome.passed += int(result[1])
            outcome.failed += int(result[2])
            outcome.ignored += int(result[3])
            running = None
    if running:
        outcome.failed += 1
        outcome.remarks.append(f"no result from {running}")


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in ("check", "test"):
        print("usage: run_parts.py check|test [PART ...]", file=sys.stderr)
        return 2
    run, wanted = sys.argv[1], sys.argv[2:]
    parts = parts_of(run)
    unknown = set(wanted) - {part.name for part in parts}
    if unknown:
        print(f"no such part: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)

    outcomes = []
    for part in parts:
        if wanted and part.name not in wanted:
            continue
        print(f"\n=== {run}: {part.name}: {' '.join(part.command)}", flush=True)
        outcomes.append(run_part(part))

    print(f"\n=== {run}")
    for outcome in outcomes:
        remarks = "".join(f", {remark}" for remark in outcome.remarks)
        ignored = f", {outcome.ignored} ignored" if outcome.ignored else ""
        print(f"{outcome.part.name:<14}{outcome.passed:>6} passed{outcome.failed:>5} failed"
              f"{outcome.seconds:>8.1f} s{ignored}{remarks}")
    passed = sum(outcome.passed for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
