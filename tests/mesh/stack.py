"""Stack: an Envoy with rendered configuration, the sidecar and three engines, on 127.0.0.1."""

from __future__ import annotations

import http.client
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

import gateway_xds
from chart import ROOT

sys.path.append(str(ROOT / "scripts"))
from ports import free_port  # noqa: E402

MODEL_DIR = ROOT / "tests" / "models" / "tiny"
MODEL = "qwen3"
ENGINES = 3
READY_SECONDS_MAX = 60
POLL_SECONDS = 0.1
REQUEST_SECONDS_MAX = 20
STOP_SECONDS_MAX = 10


class NotUp(Exception):
    """A part did not start, with the end of its log."""


class Answer:
    """An answer over HTTP."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    def json(self) -> dict:
        return json.loads(self.body)


def ask(port: int, method: str, path: str, body: dict | None = None,
        headers: dict[str, str] | None = None) -> Answer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_SECONDS_MAX)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"content-type": "application/json", **(headers or {})})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def until(what: str, condition, log: pathlib.Path | None = None,
          seconds_max: float = READY_SECONDS_MAX) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + seconds_max
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (OSError, http.client.HTTPException, ValueError):
            pass
        time.sleep(POLL_SECONDS)
    end = log.read_text(errors="replace")[-2000:] if log and log.exists() else ""
    raise NotUp(f"{what}: not within {seconds_max} s\n{end}")


class Frontend:
    """Imitates Dynamo's frontends in direct mode: sends a request to the worker that the
    body's `nvext` names, whichever pod it came to, and refuses one that names none."""

    def __init__(self, engines: dict[int, int]) -> None:
        self.seen: list[dict] = []
        frontend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200, {}, b"{}")

            def do_POST(self) -> None:
                body = json.loads(self.body())
                frontend.seen.append({"headers": {k.lower(): v for k, v in self.headers.items()}, "body": body})
                worker = (body.pop("nvext", None) or {}).get("backend_instance_id")
                if worker not in engines:
                    self.answer(400, {}, b'{"error": "worker id required"}')
                    return
                answer = ask(engines[worker], "POST", self.path, body)
                passed = {name: value for name, value in answer.headers.items() if name.startswith("x-engine")}
                self.answer(answer.status, passed, answer.body)

            def body(self) -> bytes:
                if "chunked" not in self.headers.get("transfer-encoding", ""):
                    return self.rfile.read(int(self.headers.get("content-length", 0)))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {**headers, "content-type": "application/json",
                                    "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Stack:
    """All parts; a context manager that ends what it has started.

    - `xds`: what a controller would send.
    - `workers_cluster`: the name of the workers' cluster in it.
    - `feed_names`: under which names the feed's cluster is, or its Service's host.
    - `is_direct`: what imitates Dynamo's frontends stands before the engines.
    - `host`: the host name that the route asks for.
    - `feed_tls`: the sidecar's `feed.tls`.
    """

    def __init__(self, xds: gateway_xds.Xds, workers_cluster: str, feed_names: list[str],
                 module: pathlib.Path, bin_dir: pathlib.Path, envoy: str, is_direct: bool,
                 model: str = MODEL, host: str | None = None, feed_tls: dict | None = None) -> None:
        self.model, self.host, self.feed_tls = model, host, feed_tls
        self.xds, self.workers_cluster, self.feed_names = xds, workers_cluster, feed_names
        self.module, self.bin_dir, self.envoy, self.is_direct = module, bin_dir, envoy, is_direct
        self.children: dict[str, subprocess.Popen] = {}
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = pathlib.Path(self.temporary.name)
        self.port, self.admin, self.status, self.feed = (free_port() for _ in range(4))
        self.engines: list[dict] = []
        self.frontends: list[Frontend] = []

    def __enter__(self) -> "Stack":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        for index in range(ENGINES):
            name = f"engine-{index + 1}"
            child = self.run(name, [str(self.bin_dir / "engine-sim"), "--model-dir", str(MODEL_DIR),
                                    "--name", name, "--port", "0",
                                    "--model-name", self.model], stdout=subprocess.PIPE)
            line = child.stdout.readline()
            if not line:
                raise NotUp(f"{name}: {self.log(name)}")
            self.engines.append(json.loads(line))
        self.start_sidecar()
        ports = [engine["port"] for engine in self.engines]
        if self.is_direct:
            by_id = dict(enumerate(ports, start=1))
            self.frontends = [Frontend(by_id) for _ in ports]
            ports = [frontend.port for frontend in self.frontends]
        hosts = {self.workers_cluster: ports, **{name: [self.feed] for name in self.feed_names}}
        bootstrap = gateway_xds.static(self.xds, self.folder, self.module, self.port, self.admin, hosts,
                                       discovers=True)
        path = self.folder / "envoy.yaml"
        path.write_text(yaml.safe_dump(bootstrap))
        self.run("envoy", [self.envoy, "-c", str(path), "--concurrency", "1", "--log-level", "warning",
                           "--disable-hot-restart"])
        until("envoy", lambda: ask(self.admin, "GET", "/ready").status == 200, self.path_of_log("envoy"))

    def start_sidecar(self) -> None:
        """Starts the sidecar and waits until it has something to tell."""
        workers = [{
            "id": index, "model": self.model, "engine": "vllm", "endpoint": f"127.0.0.1:{engine['port']}",
            "kv_events": f"tcp://127.0.0.1:{engine['events_port']}",
            "replay": f"tcp://127.0.0.1:{engine['replay_port']}", "total_kv_blocks": 1200,
        } for index, engine in enumerate(self.engines, start=1)]
        path = self.folder / "sidecar.yaml"
        path.write_text(yaml.safe_dump({
            "feed": {"listen": f"127.0.0.1:{self.feed}", **({"tls": self.feed_tls} if self.feed_tls else {})},
            "status": {"listen": f"127.0.0.1:{self.status}"},
            "models": [{"name": self.model, "directory": str(MODEL_DIR), "block_size": 16}], "workers": workers}))
        self.run("sidecar", [str(self.bin_dir / "warmpath-sidecar"), "--config", str(path)])
        until("sidecar", lambda: ask(self.status, "GET", "/readyz").status == 200, self.path_of_log("sidecar"))

    def run(self, name: str, command: list[str], **options) -> subprocess.Popen:
        log = self.path_of_log(name).open("a")
        options.setdefault("stdout", log)
        self.children[name] = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, text=True, **options)
        return self.children[name]

    def path_of_log(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.log"

    def log(self, name: str) -> str:
        return self.path_of_log(name).read_text(errors="replace")[-2000:]

    def end(self, name: str) -> None:
        """Ends one part."""
        child = self.children.pop(name)
        child.terminate()
        try:
            child.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdout:
            child.stdout.close()

    def stop(self) -> None:
        for name in list(self.children):
            self.end(name)
        for frontend in self.frontends:
            frontend.stop()
        self.temporary.cleanup()

    def chat(self, messages: list[dict], headers: dict[str, str] | None = None, **fields: object) -> Answer:
        """One turn of a conversation, through the gateway."""
        body = {"model": self.model, "max_tokens": 4, "messages": messages, **fields}
        headers = {**({"host": self.host} if self.host else {}), **(headers or {})}
        return ask(self.port, "POST", "/v1/chat/completions", body, headers)

    def warm(self, seconds_max: float = READY_SECONDS_MAX) -> None:
        """Waits until requests are routed by what is cached."""
        def is_warm() -> bool:
            answer = self.chat([{"role": "user", "content": "Is anybody there, and what do you know? " * 8}])
            return answer.headers.get("x-warmpath-reason") == "kv"
        until("a request routed by cache", is_warm, self.path_of_log("envoy"), seconds_max)
