"""Ports that are chosen now and listened on some seconds later, by another process."""

from __future__ import annotations

import random
import socket
from pathlib import Path

KERNELS_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST = 20000  # below lie Ray's workers (10002 to 19999) and most services
TRIES = 100


def free_port(address: str) -> int:
    """A port of `address` that nobody uses now, if possible one that the kernel hands to nobody.

    Who asks the kernel for any port, as every gloo group and every Ray process does many times at a start, can be given
    the very port that is free now and wanted in a moment. Those ports begin at 32768 by default, so we take lower ones.
    """
    ours = range(LOWEST, _first_of_kernel())
    chance = random.SystemRandom()  # a seeded run would take the ports of another run with that seed
    for _ in range(TRIES if ours else 0):
        found = _bound(address, chance.choice(ours))
        if found is not None:
            return found
    found = _bound(address, 0)
    assert found is not None, "the kernel finds a port or raises"
    return found


def _first_of_kernel() -> int:
    try:
        return int(KERNELS_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):  # another system: then as if it handed out every port
        return 0


def _bound(address: str, port: int) -> int | None:
    """The port that a socket could have, None where it is in use."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, port))
        except OSError:
            if port:
                return None
            raise
        return int(probe.getsockname()[1])
