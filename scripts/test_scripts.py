"""Tests of the scripts that decide whether a build is good.

    python3 scripts/test_scripts.py

A check that cannot fail is worse than none, so each one is shown the fault it
is there to find. The last line is `N passed, N failed`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import unittest
from unittest import mock

import bench
import bench_start
import check_capabilities
import check_dependencies
import check_docs
import check_invariants
import check_manifests
import check_module
import compose_native
import run_parts
import test_compose


def leb(number: int) -> bytes:
    out = b""
    while number >= 0x80:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def name(text: str) -> bytes:
    return leb(len(text)) + text.encode()


def section(number: int, content: bytes) -> bytes:
    return bytes([number]) + leb(len(content)) + content


def module(imports=("env.proxy_log",), code=300, pages=17, data=b"", exports=None) -> bytes:
    """A module with just the sections that the check reads."""
    if exports is None:
        exports = [names.split("|")[0] for names in sorted(check_module.EXPORTS_REQUIRED)]
    entries = b"".join(
        name(entry.split(".")[0]) + name(entry.split(".")[1]) + b"\0\0" for entry in imports
    )
    return (
        b"\0asm\1\0\0\0"
        + section(2, leb(len(imports)) + entries)
        + section(5, b"\1\0" + leb(pages))
        + section(7, leb(len(exports)) + b"".join(name(entry) + b"\0\0" for entry in exports))
        + section(10, bytes(code))
        + (section(11, data) if data else b"")
    )


class Capabilities(unittest.TestCase):
    """Goal: a list that says too little or too much is named."""

    NAMES = {"proxy_log", "proxy_on_tick"}
    GOOD = "runtime: envoy.wasm.runtime.v8\nallowed_capabilities: {\n  proxy_log: {}, proxy_on_tick: {}}\n"

    def faults(self, text: str, is_bootstrap=True) -> list[str]:
        return check_capabilities.file_faults(text, self.NAMES, is_bootstrap)

    def test_both_ways_to_write_a_list(self):
        block = "allowed_capabilities:\n  proxy_log: {}\n  proxy_on_tick: {}\n"
        for text in [self.GOOD, self.GOOD.split("\n")[0] + "\n" + block]:
            self.assertEqual(self.faults(text), [])

    def test_what_is_missing_or_too_much(self):
        self.assertEqual(self.faults(self.GOOD.replace("proxy_log", "proxy_http_call")),
                         ["not listed: proxy_log", "listed, not needed: proxy_http_call"])
        self.assertEqual(self.faults(self.GOOD.replace("{\n", "{proxy_log: {}, ")),
                         ["a name twice"])

    def test_a_bootstrap_without_a_list(self):
        text = self.GOOD.split("\n")[0]
        self.assertEqual(self.faults(text), ["1 VMs, 0 lists of capabilities"])
        self.assertEqual(self.faults(text, is_bootstrap=False), [])

    def test_a_module_that_lacks_something(self):
        found = check_capabilities.module_faults(module(), self.NAMES)
        self.assertEqual(found, ["the module lacks proxy_on_tick"])


class Module(unittest.TestCase):
    """Goal: each fault of a module fails its own check and no other."""

    def failures(self, data: bytes, limit=1000) -> list[str]:
        with contextlib.redirect_stdout(io.StringIO()):
            results = check_module.check(data, limit)
        return [sentence.split(":")[0] for passed, sentence in results if not passed]

    def test_a_good_module_passes(self):
        self.assertEqual(self.failures(module()), [])

    def test_foreign_imports(self):
        for foreign in ["wasi_snapshot_preview1.fd_write", "env.random", "js.proxy_log"]:
            self.assertEqual(
                self.failures(module(imports=("env.proxy_log", foreign))),
                ["imports only proxy-wasm host functions"], foreign)

    def test_the_monotonic_clock_is_the_only_other_import(self):
        imports = ("env.proxy_log", "wasi_snapshot_preview1.clock_time_get")
        self.assertEqual(self.failures(module(imports=imports)), [])
        self.assertEqual(list(check_module.IMPORTS_ALLOWED), list(imports[1:]))

    def test_a_module_without_imports_is_no_filter(self):
        self.assertEqual(self.failures(module(imports=())),
                         ["imports only proxy-wasm host functions"])

    def test_missing_exports(self):
        self.assertEqual(self.failures(module(exports=["memory"])),
                         ["exports what the host calls"])

    def test_code_size(self):
        self.assertEqual(self.failures(module(code=1000)), [])
        self.assertEqual(self.failures(module(code=1001)),
                         ["code section 1,001 of at most 1,000 bytes"])

    def test_memory(self):
        self.assertEqual(self.failures(module(pages=16384)), [])
        self.assertEqual(len(self.failures(module(pages=16385))), 1)

    def test_paths_of_the_machine(self):
        for path in [b"/root/.cargo/x.rs", str(check_module.ROOT).encode() + b"/core"]:
            self.assertEqual(self.failures(module(data=path)),
                             ["tells no path of the build machine"], path)

    def test_hooks_of_tests(self):
        for hook in check_module.TEST_HOOKS:
            self.assertEqual(self.failures(module(data=b"-" + hook + b"-")),
                             ["has no hooks of tests"], hook)
        # The texts must be those that the hooks are made of.
        source = (check_module.ROOT / "filter/src/hooks.rs").read_bytes()
        for hook in check_module.TEST_HOOKS:
            self.assertIn(hook, source)

    def test_every_truncation_is_refused_or_judged(self):
        whole = module()
        for length in range(len(whole)):
            with contextlib.suppress(check_module.Malformed):
                self.assertNotEqual(self.failures(whole[:length]), [], length)


class Licences(unittest.TestCase):
    """Goal: an SPDX expression is met exactly when its logic says so."""

    def test_expressions(self):
        allowed = {"MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"}
        for expression, expected in [
            ("MIT", True),
            ("GPL-3.0", False),
            ("GPL-3.0 OR MIT", True),
            ("MIT/GPL-3.0", True),
            ("MIT AND GPL-3.0", False),
            ("MIT AND Apache-2.0", True),
            ("GPL-3.0 OR MIT AND MPL-2.0", False),
            ("(GPL-3.0 OR MIT) AND Apache-2.0", True),
            ("Apache-2.0 WITH LLVM-exception", True),
            ("MIT WITH LLVM-exception", False),
            ("Apache-2.0 WITH LLVM-exception OR GPL-2.0", True),
        ]:
            self.assertEqual(check_dependencies.satisfied(expression, allowed), expected,
                             expression)

    def test_malformed_expressions(self):
        for expression in ["", "(MIT", "MIT)", "MIT OR", "MIT Apache-2.0"]:
            with self.assertRaises(ValueError, msg=expression):
                check_dependencies.satisfied(expression, {"MIT", "Apache-2.0"})

    def test_violations(self):
        policy = {
            "licenses": {"allow": ["MIT"], "exceptions": [{"crate": "odd", "allow": ["Odd-1"]}]},
            "bans": {"deny": [{"crate": "bad", "reason": "because"}]},
            "sources": {"unknown-git": "deny", "unknown-registry": "deny"},
        }
        registry = check_dependencies.REGISTRY

        def found(crate, licence="MIT", source=registry):
            package = {"name": crate, "license": licence, "source": source}
            return len(check_dependencies.violations(package, policy))

        self.assertEqual(found("good"), 0)
        self.assertEqual(found("good", licence=None), 1)
        self.assertEqual(found("good", licence="Odd-1"), 1)
        self.assertEqual(found("odd", licence="Odd-1"), 0)
        self.assertEqual(found("bad"), 1)
        self.assertEqual(found("good", source="git+https://example.com/x"), 1)
        self.assertEqual(found("good", source="registry+https://example.com/index"), 1)
        self.assertEqual(found("bad", licence="", source="git+https://example.com/x"), 3)

    def test_rules_that_nobody_enforces_are_refused(self):
        self.assertEqual(check_dependencies.unknown_keys({"bans": {"deny": []}}), [])
        self.assertEqual(check_dependencies.unknown_keys({"bans": {"skip": []}}), ["bans.skip"])
        self.assertEqual(check_dependencies.unknown_keys({"advisories": {}}), ["advisories"])


class Counting(unittest.TestCase):
    """Goal: no way for a part to fail without adding to the failures."""

    RESULT = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out"
    STARTED = "     Running unittests src/lib.rs (target/debug/deps/some-0123)"

    def outcome(self, count: str, lines: list[str], status: int) -> tuple[int, int]:
        outcome = run_parts.Outcome(run_parts.Part("part", [], count, 1))
        run_parts.count_output(outcome, lines, status)
        return outcome.passed, outcome.failed

    def test_cargo(self):
        good = [self.STARTED, self.RESULT]
        bad = self.RESULT.replace("ok. 3 passed; 0", "FAILED. 2 passed; 1")
        for lines, status, expected in [
            (good, 0, (3, 0)),
            (good + good, 0, (6, 0)),
            ([self.STARTED, bad], 101, (2, 1)),
            (good, 101, (3, 1)),  # a binary failed to build
            ([self.STARTED], 101, (0, 1)),  # crashed
            ([self.STARTED, self.STARTED, self.RESULT], 101, (3, 1)),  # the first crashed
            ([self.STARTED, self.STARTED], 101, (0, 2)),
            ([], 0, (0, 1)),  # tested nothing
            ([], 101, (0, 1)),
            ([self.RESULT.replace("3 passed", "0 passed")], 0, (0, 1)),
        ]:
            self.assertEqual(self.outcome("cargo", lines, status), expected, (lines, status))

    def test_summary(self):
        for lines, status, expected in [
            (["5 passed, 0 failed"], 0, (5, 0)),
            (["5 passed, 0 failed", ""], 0, (5, 0)),
            (["5 passed, 2 failed"], 1, (5, 2)),
            (["5 passed, 0 failed"], 1, (5, 1)),
            (["5 passed, 2 failed"], 0, (5, 2)),
            (["5 passed, 0 failed", "Segmentation fault"], 139, (0, 1)),
            (["0 passed, 0 failed"], 0, (0, 1)),
            ([], 0, (0, 1)),
        ]:
            self.assertEqual(self.outcome("summary", lines, status), expected, (lines, status))

    def test_status(self):
        self.assertEqual(self.outcome("status", [], 0), (1, 0))
        self.assertEqual(self.outcome("status", ["5 passed, 0 failed"], 3), (0, 1))

    def test_real_processes(self):
        with tempfile.TemporaryDirectory() as folder:
            logs, run_parts.LOGS = run_parts.LOGS, pathlib.Path(folder)
            try:
                for command, limit, expected in [
                    (["true"], 1, (1, 0)),
                    (["false"], 1, (0, 1)),
                    (["/nonexistent"], 1, (0, 1)),
                    (["bash", "-c", "kill -9 $$"], 1, (0, 1)),
                    (["cat"], 1, (1, 0)),  # no input: does not wait for any
                    (["tail", "-f", "/dev/null"], 0, (0, 1)),  # beyond its time
                ]:
                    with contextlib.redirect_stdout(io.StringIO()):
                        part = run_parts.Part("part", command, "status", limit)
                        outcome = run_parts.run_part(part)
                    self.assertEqual((outcome.passed, outcome.failed), expected, command)
            finally:
                run_parts.LOGS = logs


class Benchmarks(unittest.TestCase):
    """One table of all parts' rows."""

    ROW = {"name": "a", "unit": "ms", "value": 0.25, "baseline": 1.0, "ratio": 4.0}

    def test_goals(self):
        for goal, met in [
            (None, None),
            ({"ratio_min": 4.0}, True),
            ({"ratio_min": 4.1}, False),
            ({"ratio_min": 4.0, "value_max": 0.25}, True),
            ({"ratio_min": 4.0, "value_max": 0.24}, False),
            ({"value_min": 0.26}, False),
        ]:
            self.assertEqual(bench.is_met(self.ROW | {"goal": goal}), met, goal)
        # What has no baseline cannot be so much better than it.
        alone = {"name": "a", "unit": "ms", "value": 1.0, "goal": {"ratio_min": 1.0}}
        self.assertFalse(bench.is_met(alone))

    def test_rows_are_checked(self):
        def of(change):
            return bench.rows_of("p", json.dumps([self.ROW | change]))

        self.assertEqual(of({"note": "n", "goal": {"value_max": 1}})[0]["note"], "n")
        for change in [
            {"value": "1"}, {"value": None}, {"value": True}, {"speed": 1}, {"goal": {"max": 1}},
            {"goal": {"value_max": "1"}}, {"value": math.nan}, {"ratio": math.inf},
        ]:
            with self.assertRaises(bench.BadRows, msg=change):
                of(change)
        for text in ["{}", "[1]", '[{"name": "a", "value": 1}]', "not"]:
            with self.assertRaises(bench.BadRows, msg=text):
                bench.rows_of("p", text)

    def test_merging(self):
        late = {"name": "b", "unit": "B", "value": 12345.678}
        goal = {"name": "c", "unit": "ms", "value": 1.23456, "goal": {"value_max": 1.0}}
        rows = bench.merged({"p": [self.ROW, goal], "q": [late]}, {"p": "1", "q": "2"})
        self.assertEqual([row["name"] for row in rows], ["c", "a", "b"])
        self.assertEqual([row["commit"] for row in rows], ["1", "1", "2"])
        self.assertEqual((rows[0]["value"], rows[0]["met"], rows[2]["value"]), (1.235, False, 12346))
        self.assertEqual(rows[2]["baseline"], None)
        for parts in [{"p": [late], "q": [late]}, {"p": [late, late]}]:
            with self.assertRaises(bench.BadRows):
                bench.merged(parts, {})
        text = bench.table(rows).splitlines()
        self.assertRegex(text[1], r"^c +ms +1\.235 +≤ 1\.0 +NO$")

    def test_files(self):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            (root / "parts").mkdir()
            (root / "parts" / "gateway.json").write_text(json.dumps([self.ROW]))
            (root / "parts" / "ingest.json").write_text(json.dumps([self.ROW | {"name": "i"}]))
            with mock.patch.multiple(bench, PARTS=root / "parts", SUMMARY=root / "s.json"):
                bench.merge()
                first = json.loads((root / "s.json").read_text())
                self.assertEqual([row["name"] for row in first], ["a", "i"])
                self.assertTrue(all(row["commit"] for row in first))
                # The commit of a part is the one that it was measured at.
                stamp = root / "parts" / "gateway.commit"
                stamp.write_text("then\n")
                bench.merge()
                self.assertEqual(json.loads((root / "s.json").read_text())[0]["commit"], "then")
                later = stamp.stat().st_mtime + 10
                os.utime(root / "parts" / "gateway.json", (later, later))
                bench.merge()
                self.assertNotEqual(json.loads((root / "s.json").read_text())[0]["commit"], "then")

    def test_commands(self):
        self.assertIsNone(bench.run_command(["true"], 1))
        self.assertEqual(bench.run_command(["false"], None), "ended with status 1")
        self.assertIn("ended after", bench.run_command(["sleep", "60"], 0.001))

    def test_time(self):
        """On idle cores `make bench` takes 20 minutes at most, its short form 3."""
        self.assertLessEqual(sum(part.minutes for part in bench.ALL), 20)
        self.assertLessEqual(sum(part.quick_minutes or 0 for part in bench.ALL), 3)
        self.assertTrue(bench.ALL[0].script.exists())


class Documents(unittest.TestCase):
    """Goal: what looks like a file or a target of ours is found, other text is not."""

    def test_paths(self):
        folders = {"core", "scripts"}
        for text, expected in [
            ("core/src/hash.rs", True),
            ("core/", False),  # no name within
            ("gone/away.rs", True),
            ("application/json", False),
            ("target/warmpath.wasm", False),
            ("warmpath/lease", False),
            ("core::hash", False),
            ("scripts/*.sh", True),
        ]:
            self.assertEqual(check_docs.is_path(text, folders), expected, text)

    def test_targets(self):
        for text, expected in [
            ("make check test", [" check test"]),
            ("make run # the demo", [" run"]),
            ("$ make smoke", [" smoke"]),
            ("make run ENVOY=/usr/bin/envoy", [" run"]),
            ("we make a choice", []),
        ]:
            self.assertEqual([match[1] for match in check_docs.MAKE.finditer(text)], expected,
                             text)

    def test_documents(self):
        with tempfile.NamedTemporaryFile("w", suffix=".md") as document:
            document.write("[x](gone.md) `core/src/lib.rs` `core/src/gone.rs`\n"
                           "```sh\nmake help\nmake nothing\n```\n")
            document.flush()
            found = dict(check_docs.names(pathlib.Path(document.name), {"core"}))
        self.assertEqual(found, {
            "link gone.md": False, "path core/src/lib.rs": True, "path core/src/gone.rs": False,
            "make help": True, "make nothing": False,
        })


class Invariants(unittest.TestCase):
    """Goal: each forbidden thing is seen in code, and not in comments or tests."""

    def seen(self, pattern: re.Pattern, text: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            root, check_invariants.ROOT = check_invariants.ROOT, pathlib.Path(folder)
            try:
                (check_invariants.ROOT / "x.rs").write_text(text)
                return bool(check_invariants.places(["x.rs"], pattern))
            finally:
                check_invariants.ROOT = root

    def test_impure_code(self):
        for text in [
            "use std::time::Instant;", "std::env::var(\"X\")", "use std::collections::HashMap;",
            "use std::collections::{BTreeMap, HashSet};", "    std::thread::spawn(f);",
            "std::io::stdin()", "io::stderr().lock()",
        ]:
            self.assertTrue(self.seen(check_invariants.IMPURE, text), text)
        for text in [
            "// std::time is an argument", "use std::collections::BTreeMap;", "impl std::io::Write for Buffer {}",
            "/// no `std::env` here", "use hashbrown::HashMap;", "let x = 1; // std::thread",
            "fn a() {}\n#[cfg(test)]\nmod tests {\n use std::collections::HashMap;\n}",
        ]:
            self.assertFalse(self.seen(check_invariants.IMPURE, text), text)

    def test_host_calls(self):
        for text in ["proxy_wasm::hostcalls::log(x)", 'unsafe extern "C" { fn f(); }']:
            self.assertTrue(self.seen(check_invariants.HOST_CALLS, text), text)
        self.assertFalse(self.seen(check_invariants.HOST_CALLS, "use proxy_wasm::types::Action;"))


class Manifests(unittest.TestCase):
    """Goal: what YAML itself lets pass, the check does not."""

    def faults(self, text: str, name="kubernetes/x.yaml") -> int:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            return len(check_manifests.faults(path))

    def test_objects(self):
        good = "apiVersion: v1\nkind: K\nmetadata: {name: n}\nspec: {a: 1}\n"
        self.assertEqual(self.faults(good), 0)
        self.assertEqual(self.faults(good + "---\n" + good), 0)
        self.assertEqual(self.faults(good + "---\nkind: K\n"), 3)
        self.assertEqual(self.faults(good + "kind: K\n"), 1)
        self.assertEqual(self.faults("a: [1\n"), 1)
        self.assertEqual(self.faults(""), 1)
        self.assertEqual(self.faults("a: &x {b: 1}\nc:\n  <<: *x\n  b: 2\n", "y.yaml"), 0)

    def test_mounts(self):
        text = "services: {a: {volumes: ['./%s:/x:ro', '${W:-../target/w.wasm}:/y:ro']}}\n"
        self.assertEqual(self.faults(text % "fill.sh", "docker-compose.yaml"), 0)
        self.assertEqual(self.faults(text % "gone.sh", "docker-compose.yaml"), 1)
        named = "services: {a: {volumes: ['data:/x']}}\n"
        self.assertEqual(self.faults(named + "volumes: {data: {}}\n", "docker-compose.yaml"), 0)
        self.assertEqual(self.faults(named, "docker-compose.yaml"), 1)


class Compose(unittest.TestCase):
    """Goal: what the compose test compares is what stands there."""

    def test_metrics_of_an_expression(self):
        for expression, names in [
            ('sum by (warmpath_a) (rate(warmpath_b_total{reason="warmpath_c"}[5m]))', {"warmpath_b_total"}),
            ("warmpath:figure:rate5m > 1", set()),
            ("increase(envoy_x[1m]) - on (warmpath_d) warmpath_e", {"envoy_x", "warmpath_e"}),
        ]:
            self.assertEqual(test_compose.metrics_in(expression), names)

    def test_names_on_a_page(self):
        page = "# TYPE a counter\na_total{x=\"b c\"} 1\n\nd 2\n# EOF\n"
        self.assertEqual(test_compose.names_on(page), {"a_total", "d"})

    def test_alerts(self):
        match = test_compose.ALERT.fullmatch("max by (a) (b) > 0.5")
        self.assertEqual(match["figure"], "max by (a) (b)")
        for other in ["a", "a > b", "absent(a)", "a > 1 or b"]:
            self.assertIsNone(test_compose.ALERT.fullmatch(other), other)

    def test_panels_that_lie_on_others(self):
        def dashboard(*places):
            return {"panels": [
                {"title": str(number), "gridPos": dict(zip("xywh", place))}
                for number, place in enumerate(places)]}
        self.assertEqual(test_compose.overlaps(dashboard((0, 0, 12, 8), (12, 0, 12, 8))), [])
        self.assertEqual(test_compose.overlaps(dashboard((0, 0, 12, 8), (11, 7, 2, 2))), ["1"])
        self.assertEqual(test_compose.overlaps(dashboard((20, 0, 5, 1))), ["0"])

    def test_labels(self):
        self.assertEqual(test_compose.matched("blind_.+", ["blind_x", "xblind_x", "kv"]), {"blind_x"})
        self.assertEqual(test_compose.MATCHER.findall('a{b=~"c|d", e!="f"}'),
                         [("b", "=~", "c|d"), ("e", "!=", "f")])

    def test_services_start_after_what_they_need(self):
        services = {"a": {"depends_on": {"b": {}}}, "b": {}, "c": {"depends_on": {"a": {}}}}
        self.assertEqual(compose_native.in_order(services), ["b", "a", "c"])
        services["b"]["depends_on"] = {"c": {}}
        with self.assertRaises(compose_native.Wrong):
            compose_native.in_order(services)

    def test_programs_of_images(self):
        program = compose_native.program_of
        self.assertEqual(program({"image": "prom/prometheus:v1", "command": ["--a"]}),
                         ["prometheus", "--a"])
        self.assertEqual(program({"image": "envoyproxy/envoy:v1", "entrypoint": ["sh", "-c"],
                                  "command": ["x"]}), ["sh", "-c", "x"])
        self.assertIsNone(program({"image": "grafana/grafana:1"}))
        with self.assertRaises(compose_native.Wrong):
            program({"image": "other:1"})


class Start(unittest.TestCase):
    """The start benchmark: rows, and answers that must not pass."""

    def test_rows_are_those_of_the_other_parts(self):
        beside = bench_start.row("ready", "s", 2.0, baseline=0.5, goal=2, note="x")
        self.assertEqual(beside, {
            "name": "ready", "unit": "s", "value": 2.0, "baseline": 0.5, "ratio": 0.25,
            "goal": {"value_max": 2}, "note": "x"})
        alone = bench_start.row("compile", "ms", 1.0)
        self.assertEqual(set(alone), {"name", "unit", "value", "baseline", "ratio"})

    def test_a_prediction_of_more_than_there_is_ends_the_run(self):
        bench = bench_start.Bench.__new__(bench_start.Bench)
        bench.sent = 0
        envoy, model = argparse.Namespace(gateway=1), argparse.Namespace(name="m")
        answers = [None, ("warming_model", "0", "32"), ("kv", "16", "32"), ("kv", "32", "32")]
        bench.ask = lambda *_: answers.pop(0)
        bench.check_prediction(envoy, model)
        self.assertEqual(answers, [])
        answers += [None, ("kv", "48", "32")]
        with self.assertRaises(bench_start.Wrong):
            bench.check_prediction(envoy, model)


class Count(unittest.TextTestResult):
    """Counts the tests that passed, too."""

    passed = 0

    def addSuccess(self, test):  # noqa: N802, the library's name
        super().addSuccess(test)
        self.passed += 1


if __name__ == "__main__":
    runner = unittest.TextTestRunner(stream=sys.stdout, resultclass=Count, verbosity=2)
    result = runner.run(unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]))
    failed = len(result.failures) + len(result.errors)
    print(f"{result.passed} passed, {failed} failed")
    sys.exit(1 if failed or not result.passed else 0)
