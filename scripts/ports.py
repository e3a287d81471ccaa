"""Ports of 127.0.0.1 for servers that must be told theirs: tests/src/stack/ports.rs,
which says why they come from below the range that the system hands out."""

from __future__ import annotations

import itertools
import os
import pathlib
import socket

SYSTEM_RANGE = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range")
SYSTEM_FIRST = 32_768
PORTS_MIN = 8_192
FIRST = 10_000
TRIED_MAX = 64

_calls = itertools.count(os.getpid() * TRIED_MAX)


def free_port() -> int:
    """A port that is free now, and that no other call in this process has had.

    Raises OSError if there is none among `TRIED_MAX`.
    """
    first = int(SYSTEM_RANGE.read_text().split()[0]) if SYSTEM_RANGE.exists() else 0
    if first < FIRST + PORTS_MIN:
        first = SYSTEM_FIRST
    for call in itertools.islice(_calls, TRIED_MAX):
        port = FIRST + call % (first - FIRST)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {FIRST} on")
