"""Kube proto: Namespaces and Secrets in protobuf, the only form in which kubectl and
Helm send those.

An object is `k8s\\0`, then a `runtime.Unknown` with kind and version (1) and the
object itself (2). Of objects the fields that those programs set are read.
"""

from __future__ import annotations

import base64

MAGIC = b"k8s\x00"


def fields(data: bytes):
    """Yields `(number, value)`: bytes, or an integer."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            length = varint()
            yield tag >> 3, data[at:at + length]
            at += length
        else:
            raise ValueError(f"wire type {tag & 7}")


def entry(data: bytes) -> tuple[str, bytes]:
    """An entry of a map."""
    parts = dict(fields(data))
    return parts.get(1, b"").decode(), parts.get(2, b"")


def metadata(data: bytes) -> dict:
    """Names and labels."""
    names = {1: "name", 3: "namespace", 5: "uid", 6: "resourceVersion"}
    maps = {11: "labels", 12: "annotations"}
    made: dict = {}
    for number, value in fields(data):
        if number in names and value:
            made[names[number]] = value.decode()
        elif number in maps:
            key, text = entry(value)
            made.setdefault(maps[number], {})[key] = text.decode()
    return made


def decode(data: bytes) -> dict:
    """An object.

    Raises `ValueError` if it is of another kind or form.
    """
    if not data.startswith(MAGIC):
        raise ValueError("not Kubernetes' protobuf")
    envelope = dict(fields(data[len(MAGIC):]))
    of = dict(fields(envelope[1]))
    api, kind = of[1].decode(), of[2].decode()
    made = {"apiVersion": api, "kind": kind, "metadata": {}}
    if (api, kind) not in (("v1", "Namespace"), ("v1", "Secret")):
        raise ValueError(f"{kind} in protobuf")
    for number, value in fields(envelope[2]):
        if number == 1:
            made["metadata"] = metadata(value)
        elif kind == "Secret" and number == 2:
            key, raw = entry(value)
            made.setdefault("data", {})[key] = base64.b64encode(raw).decode()
        elif kind == "Secret" and number == 3:
            made["type"] = value.decode()
    return made
