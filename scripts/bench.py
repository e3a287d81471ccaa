"""Runs the benchmarks and makes one table of their figures.

    python3 scripts/bench.py run [--quick] [--record] [PART ...]
    python3 scripts/bench.py merge

Each part is a script that measures and writes its rows to
`target/bench/parts/PART.json` (tests/src/bench/rows.rs says what a row is). `run`
builds what the parts need, runs them one after the other, and then does what `merge`
does: puts all parts' rows into `target/bench/summary.json`, with the commit, and
prints them. A part that is measured again replaces its rows; parts that were not run
keep theirs.

`--quick` runs the short form of those parts that have one. `--record` keeps the
summary under `tests/bench-records/`, with date and machine.

The exit status says whether every part ran, right answers included. That a goal was
missed is in the table and changes nothing: a busy machine is no mistake.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARTS = ROOT / "target" / "bench" / "parts"
SUMMARY = ROOT / "target" / "bench" / "summary.json"
RECORDS = ROOT / "tests" / "bench-records"

# Members of a row, and what they must be.
TEXT, NUMBER = (str,), (int, float)
MEMBERS = {
    "name": TEXT,
    "unit": TEXT,
    "value": NUMBER,
    "baseline": (*NUMBER, type(None)),
    "ratio": (*NUMBER, type(None)),
    "goal": (dict, type(None)),
    "note": TEXT,
}
REQUIRED = {"name", "unit", "value"}
GOALS = {"value_max", "value_min", "ratio_min"}


@dataclasses.dataclass(frozen=True)
class Part:
    """A benchmark: `scripts/bench-NAME.sh`, run if it is there."""

    name: str
    minutes: float
    """What it takes on two idle cores, at most. The sum is what `make bench` takes."""
    quick_minutes: float | None = None
    """The same for its short form, which it runs with `--quick`; `None` if it has none."""
    prepares: bool = False
    """Whether `prepare` builds and installs what it needs, outside its time."""

    @property
    def script(self) -> pathlib.Path:
        return ROOT / "scripts" / f"bench-{self.name}.sh"


ALL = [
    Part("gateway", 8, quick_minutes=1, prepares=True),
    Part("core", 4, quick_minutes=1.5, prepares=True),
    Part("feed", 4, prepares=True),
    Part("neighbour", 2, prepares=True),
    Part("start", 2, quick_minutes=0.5, prepares=True),
]

# A part is ended, and failed, after so many times its minutes: it hangs. That a machine
# is busy is no mistake.
PATIENCE = 3


class BadRows(Exception):
    """A part that is not a list of rows; says which and why."""


def rows_of(part: str, text: str) -> list[dict]:
    """The rows of a part's file."""
    try:
        rows = json.loads(text, parse_constant=lambda word: math.nan)
    except json.JSONDecodeError as error:
        raise BadRows(f"{part}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise BadRows(f"{part}: not a list")
    for row in rows:
        if not isinstance(row, dict) or not REQUIRED <= row.keys():
            raise BadRows(f"{part}: a row without {', '.join(sorted(REQUIRED))}")
        for member, value in row.items():
            kinds = MEMBERS.get(member)
            if kinds is None or not isinstance(value, kinds) or isinstance(value, bool):
                raise BadRows(f"{part}: {row['name']}: {member} is {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise BadRows(f"{part}: {row['name']}: {member} is no number")
        goal = row.get("goal") or {}
        if not goal.keys() <= GOALS or not all(isinstance(it, NUMBER) for it in goal.values()):
            raise BadRows(f"{part}: {row['name']}: unknown goal {goal}")
    return rows


def is_met(row: dict) -> bool | None:
    """Whether a row's goal is reached; `None` if it has none. What was not measured
    is not reached."""
    goal = row.get("goal")
    if not goal:
        return None
    value, ratio = row["value"], row.get("ratio")
    return (
        value <= goal.get("value_max", math.inf)
        and value >= goal.get("value_min", -math.inf)
        and ("ratio_min" not in goal or (ratio is not None and ratio >= goal["ratio_min"]))
    )


def merged(parts: dict[str, list[dict]], commits: dict[str, str]) -> list[dict]:
    """One list of all parts' rows, those with goals first, each with its commit.

    A name that two parts have is a mistake."""
    seen: dict[str, str] = {}
    rows = []
    for part, own in parts.items():
        for row in own:
            other = seen.setdefault(row["name"], part)
            if other != part or sum(it["name"] == row["name"] for it in own) > 1:
                raise BadRows(f"{part}: {row['name']} is there twice (also in {other})")
            full = {
                "name": row["name"],
                "unit": row["unit"],
                "value": rounded(row["value"]),
                "baseline": rounded(row.get("baseline")),
                "ratio": rounded(row.get("ratio")),
                "commit": commits.get(part, "unknown"),
                "part": part,
            }
            if row.get("goal"):
                full["goal"] = row["goal"]
                full["met"] = is_met(row)
            if row.get("note"):
                full["note"] = row["note"]
            rows.append(full)
    return sorted(rows, key=lambda row: "goal" not in row)


def rounded(value: float | None) -> float | None:
    """To four significant digits, or whole above ten thousand."""
    if value is None or value == 0:
        return value
    if abs(value) >= 10_000:
        return round(value)
    return round(value, 3 - math.floor(math.log10(abs(value))))


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = []
    headings = ("name", "unit", "value", "baseline", "ratio", "goal", "met")
    for row in rows:
        lines.append((
            row["name"],
            row["unit"],
            *(plain(row[member]) for member in ("value", "baseline", "ratio")),
            goal_text(row.get("goal")),
            {True: "yes", False: "NO"}.get(row.get("met"), ""),
        ))
    widths = [max(len(line[at]) for line in [headings, *lines]) for at in range(len(headings))]
    text = []
    for line in [headings, *lines]:
        cells = [
            cell.ljust(width) if at in (0, 1, 5, 6) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def plain(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if value >= 10_000 else f"{value}"


def goal_text(goal: dict | None) -> str:
    words = {"ratio_min": "ratio ≥", "value_max": "≤", "value_min": "≥"}
    goal = goal or {}
    return ", ".join(f"{words[key]} {goal[key]:,}" for key in sorted(goal))


def merge() -> list[dict]:
    """Writes the summary of all parts and tells its rows."""
    parts, commits = {}, {}
    known = [part.name for part in ALL]
    found = sorted(
        PARTS.glob("*.json"),
        key=lambda path: (known.index(path.stem) if path.stem in known else len(known), path.stem),
    )
    for path in found:
        parts[path.stem] = rows_of(path.stem, path.read_text())
        stamp = path.with_suffix(".commit")
        # One that was measured by hand, without a stamp of its own, is of now.
        if stamp.exists() and stamp.stat().st_mtime >= path.stat().st_mtime:
            commits[path.stem] = stamp.read_text().strip()
        else:
            commits[path.stem] = commit()
            stamp.write_text(commits[path.stem] + "\n")
    rows = merged(parts, commits)
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    SUMMARY.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return rows


def commit() -> str:
    """The commit, and whether more than it was measured."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT, capture_output=True, text=True,
    )
    return asked.stdout.strip() or "unknown"


def machine() -> dict:
    """What the figures were taken on."""
    cpu, memory = "unknown", 0
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                memory = round(int(line.split()[1]) / 2**20)
    except OSError:
        pass
    return {"cores": os.cpu_count(), "cpu": cpu, "memory_gib": memory}


def record(rows: list[dict], command: str) -> pathlib.Path:
    """Keeps the rows with date and machine."""
    today = datetime.date.today().isoformat()
    path = RECORDS / f"{today}-bench.json"
    body = {"date": today, "machine": machine(), "command": command, "rows": rows}
    path.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    return path


def run_command(command: list[str], minutes_max: float | None) -> str | None:
    """Runs a command; why it failed, if it did."""
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        status = process.wait(minutes_max and minutes_max * 60)
    except subprocess.TimeoutExpired:
        # First politely: it stops what it has started.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return f"ended after {minutes_max} minutes"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    return None if status == 0 else f"ended with status {status}"


def run(wanted: list[str], quick: bool) -> list[str]:
    """Runs parts; tells which failed, and why."""
    parts = [part for part in ALL if part.script.exists()]
    unknown = set(wanted) - {part.name for part in parts}
    if unknown:
        return [f"no such part: {', '.join(sorted(unknown))}"]
    parts = [part for part in parts if not wanted or part.name in wanted]
    if quick:
        parts = [part for part in parts if part.quick_minutes is not None]
    flags = ["--quick"] if quick else []
    failures = []
    ready = []
    for part in parts:
        failed = None
        if part.prepares:
            print(f"\n=== bench: preparing {part.name}", flush=True)
            failed = run_command([str(part.script), "prepare", *flags], None)
        if failed:
            failures.append(f"{part.name}: not prepared: {failed}")
        else:
            ready.append(part)
    for part in ready:
        minutes = part.quick_minutes if quick else part.minutes
        print(f"\n=== bench: {part.name}, {minutes:g} minutes on idle cores", flush=True)
        rows = PARTS / f"{part.name}.json"
        # Figures of another time must not pass for those of this one.
        rows.unlink(missing_ok=True)
        begun = time.monotonic()
        failed = run_command([str(part.script), *flags], minutes * PATIENCE)
        if failed is None and not rows.exists():
            failed = "wrote no rows"
        print(f"=== bench: {part.name}: {time.monotonic() - begun:.0f} s", flush=True)
        if failed:
            failures.append(f"{part.name}: {failed}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the benchmarks; see the top of the script.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--quick", action="store_true")
    running.add_argument("--record", action="store_true")
    running.add_argument("parts", nargs="*")
    commands.add_parser("merge")
    arguments = parser.parse_args()
    failures = []
    if arguments.command == "run":
        failures = run(arguments.parts, arguments.quick)
    try:
        rows = merge()
    except BadRows as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(rows)}\n\n{len(rows)} rows in {SUMMARY.relative_to(ROOT)}")
    if arguments.command == "run" and arguments.record and not failures:
        quick = " --quick" if arguments.quick else ""
        path = record(rows, f"scripts/bench.py run{quick}")
        print(f"kept: {path.relative_to(ROOT)}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
