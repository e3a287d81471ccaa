"""Runs a compose file without a container engine: `docker compose` for tests.

    python3 scripts/compose_native.py -f FILE ... config|up|ps|logs|down [options]

Docker Compose itself reads the file (`docker-compose config`, which needs no
engine), so variables, anchors and defaults are what they are with containers. Then
each service runs as a process

- in a mount namespace of its own, where the service's files are bound to the very
  paths that the file names, and the paths of its volumes and tmpfs are empty,
- with the service's command, entry point, environment and health check,
- in the network of the caller, which must have the loopback interface only
  (scripts/isolated.sh): services listen on all interfaces, as in a container.

What comes from the image is not there: programs are those of this machine
(PROGRAMS), the user is the caller's, and limits such as `read_only` do not hold. A service
whose program no package has is left out and named.

State is kept in the folder that WARMPATH_COMPOSE_STATE names. Processes end with `down`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

# What reads compose files.
DOCKER_COMPOSE = os.environ.get("DOCKER_COMPOSE", "docker-compose")
# Entry points that images have, by the image's name; None for what cannot be had.
ENTRYPOINTS = {
    "envoyproxy/envoy": [],
    "prom/prometheus": ["prometheus"],
    "warmpath-sidecar": [],
    "warmpath-engine-sim": [],
    "grafana/grafana": None,
}
# Longest that `up --wait` waits, in seconds, and how often it looks.
READY_MAX = 120
LOOK_EVERY = 0.2
STOP_MAX = 10

# Run inside the new mount namespace: a root of its own that shows the machine's
# folders, but for /etc, which holds what programs cannot do without. Arguments:
# folder for the root, then `bind SOURCE TARGET` and `empty TARGET`, `--`, the command.
ENTER = r"""
set -euo pipefail
root=$1
shift
mount -t tmpfs tmpfs "$root"
for entry in /* /.[!.]*; do
  case $entry in
    /etc | /tmp) mkdir "$root$entry" ;;
    *)
      if [[ -L $entry ]]; then cp -a "$entry" "$root$entry"
      elif [[ -d $entry ]]; then mkdir "$root$entry" && mount --rbind "$entry" "$root$entry"
      fi
      ;;
  esac
done
for name in passwd group hosts nsswitch.conf ld.so.cache ld.so.conf ld.so.conf.d alternatives; do
  [[ ! -e /etc/$name ]] || cp -a "/etc/$name" "$root/etc/$name"
done
while [[ $1 != -- ]]; do
  if [[ $1 == empty ]]; then
    mkdir -p "$root$2"
    mount -t tmpfs tmpfs "$root$2"
    shift 2
  else
    if [[ -d $2 ]]; then mkdir -p "$root$3"; else
      mkdir -p "$(dirname "$root$3")"
      : >"$root$3"
    fi
    mount --bind "$2" "$root$3"
    shift 3
  fi
done
shift
exec chroot "$root" "$@"
"""


class Wrong(Exception):
    """What cannot be run, for the person at the terminal."""


def composed(files: list[str]) -> dict:
    """A compose file as Docker Compose understands it."""
    arguments = [word for file in files for word in ("-f", file)]
    done = subprocess.run(
        [DOCKER_COMPOSE, *arguments, "config", "--format", "json"],
        stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Wrong("docker-compose config refuses the file")
    return json.loads(done.stdout)


def program_of(service: dict) -> list[str] | None:
    """Command line of a service; None if its program cannot be had here."""
    image = service["image"].rpartition(":")[0] or service["image"]
    if image not in ENTRYPOINTS:
        raise Wrong(f"no program is known for the image {image}")
    entry = service.get("entrypoint") or ENTRYPOINTS[image]
    return None if entry is None else [*entry, *(service.get("command") or [])]


class Place:
    """Where services run: their folder, and what is known of them."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.known = folder / "services.json"

    def services(self) -> dict[str, dict]:
        return json.loads(self.known.read_text()) if self.known.exists() else {}

    def log(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.log"

    def keep(self, services: dict[str, dict]) -> None:
        self.known.write_text(json.dumps(services, indent=1))


def entered(place: Place, name: str, service: dict, command: list[str]) -> list[str]:
    """A command as it runs in its service's view of the files."""
    root = place.folder / f"{name}.root"
    root.mkdir(exist_ok=True)
    seen: list[str] = []
    for target in service.get("tmpfs", []):
        seen += ["empty", target.partition(":")[0]]
    for volume in sorted(service.get("volumes", []), key=lambda each: each["target"]):
        if volume["type"] == "bind":
            source = pathlib.Path(volume["source"])
            if not source.exists():
                raise Wrong(f"{name}: {source} is not there")
            seen += ["bind", str(source.resolve()), volume["target"]]
        else:
            data = place.folder / "volumes" / volume["source"]
            data.mkdir(parents=True, exist_ok=True)
            seen += ["bind", str(data), volume["target"]]
    return ["unshare", "--mount", "--propagation", "private", "bash", "-c", ENTER, "enter",
            str(root), *seen, "--", *command]


def environment(service: dict) -> dict[str, str]:
    """Variables of a service; of the caller's only the way to the programs."""
    return {"PATH": os.environ["PATH"], **(service.get("environment") or {})}


def born(pid: int) -> str:
    """When a process was started, in ticks; empty if it runs no more."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # The state, which is the third field of all, and the 22nd.
    return "" if fields[0] == "Z" else fields[19]


def alive(service: dict) -> bool:
    """Whether a service's process runs, and is no other that got its number."""
    return bool(service["born"]) and born(service["pid"]) == service["born"]


def healthy(place: Place, name: str, service: dict) -> bool:
    """Whether a service's own health check, if it has one, passes."""
    test = (service.get("healthcheck") or {}).get("test")
    if not test:
        return True
    command = test[1:] if test[0] == "CMD" else ["/bin/sh", "-c", test[1]]
    try:
        done = subprocess.run(
            entered(place, name, service, command), env=environment(service), timeout=10,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def in_order(services: dict[str, dict]) -> list[str]:
    """Names of services, each after those that it depends on."""
    left, order = dict(services), []
    while left:
        ready = [name for name, service in left.items()
                 if not set(service.get("depends_on") or {}) & set(left)]
        if not ready:
            raise Wrong("services depend on each other in a circle")
        order += sorted(ready)
        for name in ready:
            del left[name]
    return order


def start(place: Place, name: str, service: dict, command: list[str]) -> dict:
    """Starts a service."""
    with place.log(name).open("w") as log:
        process = subprocess.Popen(
            entered(place, name, service, command), env=environment(service),
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd="/",
            start_new_session=True)
    return {"pid": process.pid, "born": born(process.pid), "command": command}


def up(place: Place, files: list[str], wait: bool) -> None:
    """Starts every service, and waits until they are healthy."""
    services = composed(files)["services"]
    running: dict[str, dict] = {}
    for name in in_order(services):
        command = program_of(services[name])
        if command is None:
            print(f" {name}: left out, no program for {services[name]['image']} here")
            continue
        running[name] = start(place, name, services[name], command)
        # At once, so that `down` finds it whatever comes next.
        place.keep(running)
    deadline = time.monotonic() + READY_MAX
    waiting = list(running)
    while waiting:
        for name in list(waiting):
            if not alive(running[name]):
                raise Wrong(f"{name} ended; its log:\n{place.log(name).read_text()[-2000:]}")
            if not wait or healthy(place, name, services[name]):
                waiting.remove(name)
                print(f" {name}: {'healthy' if wait else 'started'}", flush=True)
        if time.monotonic() > deadline:
            raise Wrong(f"not healthy within {READY_MAX} s: {', '.join(waiting)}")
        time.sleep(LOOK_EVERY if waiting else 0)


def stop(services: dict[str, dict]) -> None:
    """Ends services: those asked last are asked to stop first."""
    for service in reversed(services.values()):
        if alive(service):
            os.killpg(service["pid"], signal.SIGTERM)
    deadline = time.monotonic() + STOP_MAX
    while any(alive(service) for service in services.values()):
        if time.monotonic() > deadline:
            for service in services.values():
                if alive(service):
                    os.killpg(service["pid"], signal.SIGKILL)
        time.sleep(LOOK_EVERY / 4)


def down(place: Place, volumes: bool) -> None:
    """Ends every service, and forgets what is asked to be forgotten."""
    stop(place.services())
    place.known.unlink(missing_ok=True)
    if volumes:
        shutil.rmtree(place.folder / "volumes", ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="A compose file without a container engine.")
    parser.add_argument("-f", "--file", action="append", required=True)
    actions = parser.add_subparsers(dest="action", required=True)
    for action, flags in {
        "config": ["--quiet"], "up": ["--build", "--detach", "--wait"], "ps": [], "logs": [],
        "down": ["--volumes"],
    }.items():
        known = actions.add_parser(action)
        for flag in flags:
            known.add_argument(flag, action="store_true")
        if action in ("logs", "ps"):
            known.add_argument("services", nargs="*")
    options = parser.parse_args()
    folder = os.environ.get("WARMPATH_COMPOSE_STATE")
    if not folder:
        parser.error("WARMPATH_COMPOSE_STATE names no folder")
    place = Place(pathlib.Path(folder))
    try:
        if options.action == "config":
            quiet = ["--quiet"] if options.quiet else []
            files = [word for file in options.file for word in ("-f", file)]
            return subprocess.run([DOCKER_COMPOSE, *files, "config", *quiet]).returncode
        if options.action == "up":
            up(place, options.file, options.wait)
        elif options.action == "down":
            down(place, options.volumes)
        else:
            for name, service in place.services().items():
                if options.services and name not in options.services:
                    continue
                state = "running" if alive(service) else "exited"
                print(f"{name:<12} {state}  {shlex.join(service['command'])[:80]}"
                      if options.action == "ps" else place.log(name).read_text())
    except (Wrong, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
