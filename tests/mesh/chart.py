"""Chart: where the chart and what is made of it are, and how Helm renders it."""

from __future__ import annotations

import os
import pathlib
import subprocess

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MESH = pathlib.Path(os.environ.get("WARMPATH_MESH") or ROOT / ".cache" / "mesh")
HELM = MESH / "bin" / "helm"
KUBECTL = MESH / "bin" / "kubectl"
CONFIG = ROOT / "envoy-config"
CHART = CONFIG / "helm" / "warmpath"
SECONDS_MAX = 60


def documents(text: str) -> list[dict]:
    """The objects of a YAML text."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def helm(*arguments: str) -> subprocess.CompletedProcess:
    """Runs Helm."""
    return subprocess.run([str(HELM), *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=SECONDS_MAX)


def render(*arguments: str, namespace: str = "inference") -> list[dict]:
    """The chart's objects with these arguments of `helm template`."""
    done = helm("template", "warmpath", str(CHART), "--namespace", namespace,
                "--kube-version", "1.33.0", *arguments)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return documents(done.stdout)


def in_namespace(objects: list[dict], namespace: str) -> list[dict]:
    """Objects as `kubectl apply --namespace` stores them."""
    for document in objects:
        document["metadata"].setdefault("namespace", namespace)
    return objects


def recipes() -> list[pathlib.Path]:
    """The folders of the recipes."""
    return sorted(path.parent for path in (CONFIG / "recipes").glob("*/values.yaml"))
