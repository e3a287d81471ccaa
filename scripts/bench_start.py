"""Measures how the gateway starts: code, time to ready, memory of its threads.

    python3 scripts/bench_start.py [--quick] [--module FILE] [--bin-dir DIR]

Writes target/bench/parts/start.json, in the form of tests/src/bench/rows.rs, and
prints the same as a table. Every figure that involves routing is taken only
after requests have been routed by cache with the prediction that the engine
then confirms; anything else ends the run with an error. Slowness never does.

Takes up to three minutes, with --quick forty seconds. Needs the module, the
programs engine-sim and warmpath-sidecar (built with --release), Envoy, Node and
the real model that `make setup` fetches.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import check_module
from ports import free_port

ROOT = check_module.ROOT
# Nothing that is waited for may take longer, in seconds.
WITHIN_S = 40
# Time between two looks at a condition, in seconds.
POLL_S = 0.004
BLOCK_SIZE = 16
# What a model must have to count as a real one.
VOCABULARY_MIN = 100_000
NODE_FLAGS = ["--no-liftoff", "--no-wasm-lazy-compilation"]
COMPILE = """
const bytes = require('fs').readFileSync(process.argv[1]);
const started = process.hrtime.bigint();
const module = new WebAssembly.Module(bytes);
const took = Number(process.hrtime.bigint() - started) / 1e6;
const names = WebAssembly.Module.exports(module).map((one) => one.name);
if (!names.includes('proxy_on_request_headers')) throw new Error('not the module');
console.log(took);
"""
LOADED = re.compile(r"vm \d+ loaded a tokenizer in (\d+) us")


class Wrong(Exception):
    """An answer is not what it must be, or a part did not come up."""


def row(name, unit, value, *, baseline=None, goal=None, note=""):
    """One figure; lower is better for all of them."""
    made = {"name": name, "unit": unit, "value": value, "baseline": baseline,
            "ratio": None if baseline is None else baseline / value}
    if goal is not None:
        made["goal"] = {"value_max": goal}
    if note:
        made["note"] = note
    return made


def get(port, path):
    """The body of a 200; `None` for anything else."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
        return body if response.status == 200 else None


class Child:
    """A process with its log; killed at the end of a `with`."""

    def __init__(self, name, command, folder):
        self.name = name
        self.log = folder / f"{name}.log"
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def text(self):
        return self.log.read_text(errors="replace")

    def wait(self, what, condition):
        """Waits for a condition. Returns the seconds since the process began."""
        while not condition():
            if self.process.poll() is not None:
                raise Wrong(f"{self.name} ended before {what}:\n{self.text()[-2000:]}")
            if time.monotonic() - self.started > WITHIN_S:
                raise Wrong(f"{self.name}: no {what}:\n{self.text()[-2000:]}")
            time.sleep(POLL_S)
        return time.monotonic() - self.started

    def memory_mb(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1000


class Model:
    """A model's files and its one engine."""

    def __init__(self, name, directory):
        self.name, self.directory = name, directory
        self.http, self.events, self.replay = free_port(), free_port(), free_port()

    def engine(self, bench):
        engine = Child(f"engine-{self.name}", [
            bench.program("engine-sim"), "--model-dir", self.directory, "--name", self.name,
            "--model-name", self.name, "--port", str(self.http), "--events-port",
            str(self.events), "--replay-port", str(self.replay), "--block-size",
            str(BLOCK_SIZE), "--prefill-us-per-token", "1", "--decode-us-per-token", "100",
        ], bench.folder)
        engine.wait("/health", lambda: get(self.http, "/health") is not None)
        return engine

    def worker(self, number):
        return (f"  - {{id: {number}, model: {self.name}, engine: vllm, role: aggregated, "
                f'endpoint: "127.0.0.1:{self.http}", kv_events: "tcp://127.0.0.1:{self.events}", '
                f'replay: "tcp://127.0.0.1:{self.replay}"}}\n')


class Bench:
    def __init__(self, arguments, folder):
        self.quick = arguments.quick
        self.module = arguments.module.resolve()
        self.bin_dir = arguments.bin_dir.resolve()
        self.folder = folder
        self.envoy = os.environ.get("ENVOY") or found("envoy")
        self.feed, self.status = free_port(), free_port()
        self.sent = 0

    def program(self, name):
        return str(self.bin_dir / name)

    def start_envoy(self, name, template, concurrency, workers):
        """Starts Envoy and waits until it is ready; its ports and the time are the
        child's."""
        gateway, admin = free_port(), free_port()
        values = {"GATEWAY_ADDRESS": "127.0.0.1", "GATEWAY_PORT": gateway, "ADMIN_PORT": admin,
                  "FEED_PORT": self.feed, "WASM_FILE": self.module, "DEBUG_HEADERS": "true"}
        values |= {f"WORKER_{place + 1}_PORT": workers[place % len(workers)] for place in range(3)}
        text = (ROOT / "envoy-config" / template).read_text()
        for key, value in values.items():
            text = text.replace("${%s}" % key, str(value))
        (self.folder / f"{name}.yaml").write_text(text)
        envoy = Child(name, [
            self.envoy, "-c", f"{name}.yaml", "--concurrency", str(concurrency),
            "--disable-hot-restart", "--log-level", "warning",
            "--component-log-level", "wasm:info",
        ], self.folder)
        envoy.gateway, envoy.admin = gateway, admin
        try:
            envoy.ready_s = envoy.wait("/ready", lambda: get(admin, "/ready") is not None)
        except BaseException:
            envoy.__exit__()
            raise
        return envoy

    def start_sidecar(self, models, workers):
        """- `models`: that it is told of; `workers`: models whose engine it is told of."""
        config = (f'feed: {{listen: "127.0.0.1:{self.feed}"}}\n'
                  f'status: {{listen: "127.0.0.1:{self.status}"}}\nmodels:\n')
        for model in models:
            config += (f'  - {{name: {model.name}, directory: "{model.directory}", '
                       f"block_size: {BLOCK_SIZE}}}\n")
        (self.folder / "sidecar.yaml").write_text(config + "workers_file: workers.yaml\n")
        self.set_workers(workers)
        sidecar = Child("sidecar", [self.program("warmpath-sidecar"), "--config", "sidecar.yaml"],
                        self.folder)
        sidecar.wait("/readyz", lambda: get(self.status, "/readyz") is not None)
        return sidecar

    def set_workers(self, models):
        text = "workers:\n" + "".join(
            model.worker(number) for number, model in enumerate(models, 1))
        (self.folder / "workers.new").write_text(text)
        (self.folder / "workers.new").rename(self.folder / "workers.yaml")

    def ask(self, port, model, text):
        """One chat on a connection of its own: reason, prediction, and what the engine
        had; `None` without a 200."""
        body = json.dumps({"model": model.name, "max_tokens": 1,
                           "messages": [{"role": "user", "content": text}]})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            try:
                connection.request("POST", "/v1/chat/completions", body,
                                   {"content-type": "application/json"})
                response = connection.getresponse()
                answer = response.read()
            except (OSError, http.client.HTTPException):
                return None
        if response.status != 200:
            return None
        details = json.loads(answer)["usage"].get("prompt_tokens_details") or {}
        return (response.getheader("x-warmpath-reason"),
                response.getheader("x-warmpath-predicted-cached-tokens"),
                str(details.get("cached_tokens", 0)))

    def until_warm(self, envoy, model, since):
        """Asks until a request is routed by cache. Returns the seconds since then."""
        # A worker whose events were never seen is not known to count as we do.
        self.ask(model.http, model, f"engine, say hello {'and again ' * 64}")
        last = None
        while True:
            self.sent += 1
            last = self.ask(envoy.gateway, model, f"probe {self.sent} {'of the gateway ' * 16}")
            if last is not None and last[0] == "kv":
                return time.monotonic() - since
            if time.monotonic() - since > WITHIN_S:
                raise Wrong(f"{model.name} is not routed by cache: {last}\n{envoy.text()[-2000:]}")
            time.sleep(POLL_S)

    def check_prediction(self, envoy, model):
        """The same prompt again must be found, exactly as much of it as the engine has."""
        self.sent += 1
        text = f"prompt {self.sent} {'that comes twice ' * 100}"
        self.ask(envoy.gateway, model, text)
        deadline = time.monotonic() + WITHIN_S
        while True:
            answer = self.ask(envoy.gateway, model, text)
            if answer is not None:
                reason, predicted, had = answer
                if reason == "kv" and int(had) >= BLOCK_SIZE and predicted == had:
                    return
                # Its events may be on their way, and the model on its way to another
                # thread; more than the engine has is always wrong.
                if reason == "kv" and int(predicted) > int(had):
                    raise Wrong(f"{model.name}: {answer}")
            if time.monotonic() > deadline:
                raise Wrong(f"{model.name}: {answer}, expected a prediction that holds")
            time.sleep(POLL_S)

    def wait_for_loads(self, envoy, count):
        envoy.wait(f"{count} tokenizers loaded", lambda: len(LOADED.findall(envoy.text())) >= count)


def found(name):
    beside = ROOT / ".venv/bin" / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        raise Wrong(f"no {name}; see: make doctor")
    return path


def real_models(folder):
    """The real models that are here, in a folder each as the programs want them."""
    sources = [ROOT / ".cache/models/qwen3", *sorted((ROOT / ".cache/tokenizers").glob("*/models"))]
    models, seen = [], set()
    for source in sources:
        try:
            text = (source / "tokenizer.json").read_bytes()
            settings = json.loads((source / "tokenizer_config.json").read_text())
        except (OSError, ValueError):
            continue
        vocabulary = json.loads(text)["model"].get("vocab") or {}
        if len(text) in seen or len(vocabulary) < VOCABULARY_MIN or "chat_template" not in settings:
            continue
        seen.add(len(text))
        directory = folder / f"model-{len(models)}"
        directory.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).symlink_to(source / name)
        shutil.copy(ROOT / ".cache/models/qwen3/config.json", directory)
        models.append(Model(f"model-{len(models)}", directory))
        if len(models) == 2:
            break
    if not models:
        raise Wrong("no model with a real tokenizer; see: make doctor")
    return models


def measure_module(bench):
    code = next(len(content) for name, content in check_module.sections(bench.module.read_bytes())
                if name == "code")
    node = found("node")
    times = []
    for _ in range(2 if bench.quick else 5):
        output = subprocess.run([node, *NODE_FLAGS, "-e", COMPILE, str(bench.module)],
                                check=True, capture_output=True, text=True).stdout
        times.append(float(output))
    return [row("code_section", "B", code, goal=1_000_000),
            row("compile", "ms", min(times),
                note=f"whole module, Node {' '.join(NODE_FLAGS)}, best of {len(times)}")]


def measure_ready(bench):
    ours, plain = [], []
    worker = free_port()
    for turn in range(2 if bench.quick else 5):
        for template, times in (("envoy.yaml", ours), ("envoy-round-robin.yaml", plain)):
            with bench.start_envoy(f"ready-{turn}", template, 2, [worker]) as envoy:
                times.append(envoy.ready_s)
    return [row("ready", "s", statistics.median(ours), baseline=statistics.median(plain), goal=2,
                note=f"2 worker threads, median of {len(ours)}, best {min(ours):.3f}; baseline: "
                     "Envoy without the module")]


def measure_models(bench, models):
    """What a VM's tokenizer costs, and how soon a model of later is routed."""
    first, later = models[0], models[1:]
    rows = []
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(model.engine(bench))
        stack.enter_context(bench.start_sidecar(models, [first]))
        ports = [model.http for model in models]
        concurrency = 2
        envoy = stack.enter_context(bench.start_envoy("models", "envoy.yaml", concurrency, ports))
        bench.until_warm(envoy, first, envoy.started)
        bench.check_prediction(envoy, first)
        # One VM for each worker thread and one of the main thread.
        bench.wait_for_loads(envoy, concurrency + 1)
        times = [int(time) / 1000 for time in LOADED.findall(envoy.text())]

        def held():
            stats = get(envoy.admin, "/stats?filter=tokenizer_bytes") or b""
            found = re.search(rb"tokenizer_bytes: ([1-9]\d*)", stats)
            return int(found[1]) if found else None

        # Gauges are told a second later.
        envoy.wait("what a VM's tokenizer holds", held)
        held = held()
        rows += [row("tokenizer_load", "ms", statistics.median(times), goal=30,
                     note=f"median of {len(times)} VMs, worst {max(times):.1f}"),
                 row("tokenizer_vm_memory", "MB", held / 1e6, goal=30,
                     note="a VM's own copy")]
        if later:
            since = time.monotonic()
            bench.set_workers([first, later[0]])
            took = bench.until_warm(envoy, later[0], since)
            bench.check_prediction(envoy, later[0])
            rows.append(row("model_added_ready", "s", took,
                            note="worker of a model not used before added to the workers' file, to "
                                 "the first request routed by cache"))
    return rows


def slope(points):
    xs, ys = zip(*points)
    return statistics.linear_regression(xs, ys).slope


def measure_memory(bench, models):
    """Resident memory of Envoy by worker threads, after every VM has all models."""
    ours, plain = [], []
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(model.engine(bench))
        stack.enter_context(bench.start_sidecar(models, models))
        ports = [model.http for model in models]
        for concurrency in (1, 4) if bench.quick else (1, 2, 4, 8):
            name = f"memory-{concurrency}"
            with bench.start_envoy(f"{name}-plain", "envoy-round-robin.yaml", concurrency,
                                   ports) as envoy:
                plain.append((concurrency, envoy.memory_mb()))
            with bench.start_envoy(name, "envoy.yaml", concurrency, ports) as envoy:
                for model in models:
                    bench.until_warm(envoy, model, envoy.started)
                    bench.check_prediction(envoy, model)
                bench.wait_for_loads(envoy, (concurrency + 1) * len(models))
                ours.append((concurrency, envoy.memory_mb()))
    seen = ", ".join(f"{mb:.0f} at {threads}" for threads, mb in ours)
    return [row("memory_per_worker_thread", "MB", slope(ours),
                note=f"slope of resident MB with {len(models)} models: {seen}; Envoy alone "
                     f"{plain[0][1]:.0f} at 1, {slope(plain):.1f} more for each")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--module", type=pathlib.Path, default=ROOT / "target/warmpath.wasm")
    parser.add_argument("--bin-dir", type=pathlib.Path, default=ROOT / "target/release")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="warmpath-start-") as folder:
        try:
            bench = Bench(arguments, pathlib.Path(folder))
            models = real_models(bench.folder)
            rows = measure_module(bench) + measure_ready(bench)
            rows += measure_models(bench, models) + measure_memory(bench, models)
        except (Wrong, OSError, subprocess.CalledProcessError) as error:
            print(f"bench_start: {error}", file=sys.stderr)
            return 1
    path = ROOT / "target/bench/parts/start.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2) + "\n")
    for one in rows:
        goal = f"  (at most {one['goal']['value_max']:,})" if "goal" in one else ""
        beside = "" if one["baseline"] is None else f"  baseline {one['baseline']:,.3f}"
        print(f"{one['name']:28} {one['value']:>14,.3f} {one['unit']}{goal}{beside}")
        if "note" in one:
            print(f"    {one['note']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
