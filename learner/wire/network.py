"""This node's address and network interface, as seen from the address where the ranks meet."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915
ADDRESS = "GRAO_NODE_ADDRESS"
"""The variable that names this node's address to whoever starts a rank: the one by which Ray's nodes know it."""
_OUTSIDE = ("192.0.2.1", 9)  # an address for documentation: nothing is sent, only a route is looked up


def node_address() -> str:
    """This node's address for others: as ADDRESS says, else the one on the way out."""
    return os.environ.get(ADDRESS) or own_address()


def own_address(peer: tuple[str, int] = _OUTSIDE) -> str:
    """The address of this node on the way to `peer`; loopback where there is no way out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(peer)
        except OSError:  # no network at all: then all workers are on this node
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def interface_of(peer: str) -> str | None:
    """Name of the interface that leads to `peer`, such as 'lo' or 'eth0'; None where it cannot be told."""
    wanted = own_address((peer, 9))
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == wanted), None)


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # an interface without an IPv4 address
            return None
    return socket.inet_ntoa(answer[20:24])
