"""Bytes of a published version for rollout workers on other nodes, to whoever knows the run's secret.

One request a connection: a line `{"secret": "...", "version": 7}`; the answer is the number of bytes as u64
little-endian and the bytes of this rank's ranges in ascending order. Length 0 answers a wrong secret, another
version or a request that cannot be read; nothing says which.
"""

from __future__ import annotations

import hmac
import json
import logging
import socketserver
import struct
import threading
from collections.abc import Callable, Sequence

LONGEST_REQUEST = 1024
TIMEOUT_S = 60.0  # for each read and write: a peer that stalls longer is cut off
Fetch = Callable[[int], Sequence[memoryview]]

log = logging.getLogger(__name__)


class PieceServer:
    """Serves one rank's piece on a port of its own until `close`."""

    def __init__(self, address: str, secret: str, fetch: Fetch) -> None:
        """`fetch(version)` gives the ranges to send, or nothing for a version that is not there."""

        class Handler(socketserver.StreamRequestHandler):
            timeout = TIMEOUT_S

            def handle(self) -> None:
                try:
                    version = read_request(self.rfile.readline(LONGEST_REQUEST), secret)
                    parts = fetch(version) if version is not None else ()
                    self.connection.sendall(struct.pack("<Q", sum(len(part) for part in parts)))
                    for part in parts:
                        self.connection.sendall(part)
                except OSError as error:
                    log.info("a reader of parameters went away: %s", error)

        self._server = _Server((address, 0), Handler)
        self.address = f"{address}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; transfers under way end by themselves or with the process."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False


def read_request(line: bytes, secret: str) -> int | None:
    """The version asked for, or None for a request that is wrong in any way."""
    try:
        request = json.loads(line)
        given, version = request["secret"], request["version"]
    except (ValueError, TypeError, KeyError):
        return None
    if not isinstance(given, str) or not isinstance(version, int):
        return None
    # compare_digest takes as long for a nearly right secret as for a wrong one
    return version if hmac.compare_digest(given.encode(), secret.encode()) else None
