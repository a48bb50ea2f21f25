"""Bring a published version to this node and check it, before any engine pauses. Bytes only: no vLLM, no torch.

A version is one run of packed bytes (`Parameters.tensors` says what lies where), followed by a trailer that names the
run and the version. Learner ranks hold pieces of it. Where all pieces lie in one file of this node, that file is used
as it is. Else the pieces are put together in a file of our own, copied from this node's shared memory or fetched from
the ranks' servers. Either way every piece's checksum is compared with the bytes that the engine is going to read.

The server's side of a fetch: read one line of JSON, {"secret": ..., "version": ...}; answer with the length as 8 bytes,
little-endian, then the bytes of the piece's ranges in order. A length of 0 means: no such version here.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import time
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt

from rollout.errors import ParametersRefused
from rollout.types import TRAILER_NBYTES, Parameters, Piece, trailer

Bytes = npt.NDArray[np.uint8]
Ranges = Iterable[tuple[int, int]]

ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_STREAMS = 8  # pieces handled at the same time; one stream seldom fills a fast network


class Staging:
    """One worker's place for incoming versions. `fetch` blocks: call it from a thread."""

    def __init__(self, fetch_timeout_s: float = 600.0, idle_timeout_s: float = 30.0) -> None:
        """`fetch_timeout_s` bounds one whole fetch, `idle_timeout_s` any single wait for a rank's server."""
        self._fetch_timeout_s = fetch_timeout_s
        self._idle_timeout_s = idle_timeout_s
        # Without a name in any folder: it cannot leak, even when this process is killed.
        self._own = os.memfd_create("grao-parameters")

    def fetch(self, parameters: Parameters) -> str:
        """Path of a file on this node with the whole, verified version and its trailer.

        Readable until the next fetch. Raises ParametersRefused, one line that names the rank and the reason.
        """
        check(parameters)
        deadline = time.monotonic() + self._fetch_timeout_s
        shared = [open_shared(parameters, piece) for piece in parameters.pieces]
        paths = {piece.path for piece in parameters.pieces}
        with ThreadPoolExecutor(max_workers=min(MAX_STREAMS, len(shared))) as pool:
            if len(paths) == 1 and shared[0] is not None:
                whole = shared[0]
                _all(pool.submit(_verify, parameters, piece, whole) for piece in parameters.pieces)
                return paths.pop()
            target = self._target(parameters)
            _all(
                pool.submit(self._bring, parameters, piece, source, target, deadline)
                for piece, source in zip(parameters.pieces, shared, strict=True)
            )
        return f"/proc/{os.getpid()}/fd/{self._own}"

    def close(self) -> None:
        """Give the memory back. The object is of no use afterwards."""
        if self._own >= 0:
            os.close(self._own)
            self._own = -1

    def _target(self, parameters: Parameters) -> Bytes:
        """Our own file, as long as the version with its trailer; the trailer is written here and checked by readers."""
        length = parameters.nbytes + TRAILER_NBYTES
        if os.fstat(self._own).st_size != length:
            os.ftruncate(self._own, length)
        target = np.frombuffer(mmap.mmap(self._own, length), dtype=np.uint8)
        target[parameters.nbytes :] = np.frombuffer(trailer(parameters.secret, parameters.version), dtype=np.uint8)
        return target

    def _bring(
        self, parameters: Parameters, piece: Piece, source: Bytes | None, target: Bytes, deadline: float
    ) -> None:
        if source is None:
            self._receive(parameters, piece, target, deadline)
        else:
            for offset, nbytes in piece.ranges:
                target[offset : offset + nbytes] = source[offset : offset + nbytes]
        _verify(parameters, piece, target)

    def _receive(self, parameters: Parameters, piece: Piece, target: Bytes, deadline: float) -> None:
        host, _, port = piece.address.rpartition(":")
        wanted = sum(nbytes for _, nbytes in piece.ranges)
        request = json.dumps({"secret": parameters.secret, "version": parameters.version}) + "\n"
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=self._idle_timeout_s) as connection:
                connection.sendall(request.encode())
                header = np.empty(8, dtype=np.uint8)
                self._fill(connection, header, deadline)
                offered = int.from_bytes(header.tobytes(), "little")
                if offered != wanted:
                    said = "does not have this version" if offered == 0 else f"offers {offered} bytes"
                    raise _refusal(parameters, piece, f"{piece.address} {said}, expected {wanted} bytes")
                for offset, nbytes in piece.ranges:
                    self._fill(connection, target[offset : offset + nbytes], deadline)
        except (OSError, ValueError) as error:
            raise _refusal(parameters, piece, f"fetching from '{piece.address}' failed: {error}") from error

    def _fill(self, connection: socket.socket, part: Bytes, deadline: float) -> None:
        view = part.data
        while view:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"not complete after {self._fetch_timeout_s:g} s")
            connection.settimeout(min(left, self._idle_timeout_s))
            got = connection.recv_into(view)
            if got == 0:
                raise ConnectionError("the connection ended early")
            view = view[got:]


def open_shared(parameters: Parameters, piece: Piece) -> Bytes | None:
    """The piece's file, if it lies on this node and carries this run's secret and this version; else None."""
    try:
        with open(piece.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # another node's path, or an empty file: not ours to read
        return None
    content = np.frombuffer(mapped, dtype=np.uint8)
    mark = trailer(parameters.secret, parameters.version)
    ours = content.nbytes == parameters.nbytes + TRAILER_NBYTES and content[parameters.nbytes :].tobytes() == mark
    return content if ours else None


def checksum(content: Bytes, ranges: Ranges) -> int:
    """Sum of the ranges' bytes as little-endian u32 words, modulo 2**64; each range is zero-padded to 4 bytes."""
    total = 0
    for offset, nbytes in ranges:
        whole = offset + nbytes // 4 * 4
        total += int(content[offset:whole].view("<u4").sum(dtype=np.uint64))
        total += int.from_bytes(content[whole : offset + nbytes].tobytes(), "little")
    return total % 2**64


def check(parameters: Parameters) -> None:
    """Refuse a notice that contradicts itself: sizes, bounds, or bytes of a tensor that no piece brings."""
    version, item = parameters.version, ITEM_NBYTES.get(parameters.dtype)
    if item is None:
        raise ParametersRefused(f"version {version}: dtype '{parameters.dtype}' is none of {', '.join(ITEM_NBYTES)}")
    if version < 0 or not parameters.pieces or not parameters.tensors:
        raise ParametersRefused(f"version {version}: a version from 0 on, with pieces and tensors, is needed")
    runs = _runs(parameters)
    starts = [start for start, _ in runs]
    for tensor in parameters.tensors:
        end = tensor.offset + tensor.nbytes
        if tensor.nbytes != item * int(np.prod(tensor.shape, dtype=np.int64)) or tensor.offset % item:
            raise ParametersRefused(f"version {version}: '{tensor.name}' has a wrong length or offset")
        run = bisect_right(starts, tensor.offset) - 1
        if run < 0 or end > runs[run][1]:
            raise ParametersRefused(f"version {version}: no piece holds all bytes of '{tensor.name}'")


def _runs(parameters: Parameters) -> list[tuple[int, int]]:
    """Runs [start, stop) of bytes that the pieces bring together, ascending. Refuses overlap and what lies outside."""
    spans = sorted(span for piece in parameters.pieces for span in piece.ranges if span[1])
    runs: list[tuple[int, int]] = []
    for offset, nbytes in spans:
        last = runs[-1][1] if runs else 0
        if offset < last or nbytes < 0 or offset + nbytes > parameters.nbytes:
            raise ParametersRefused(f"version {parameters.version}: pieces overlap or leave the file at byte {offset}")
        if runs and offset == last:
            runs[-1] = (runs[-1][0], offset + nbytes)
        else:
            runs.append((offset, offset + nbytes))
    return runs


def _all(jobs: Iterable[Future[None]]) -> None:
    """Wait for every job, then raise the first failure: no thread may still write when the caller goes on."""
    started = list(jobs)
    wait(started)
    for job in started:
        job.result()


def _verify(parameters: Parameters, piece: Piece, content: Bytes) -> None:
    if checksum(content, piece.ranges) != piece.checksum:
        raise _refusal(parameters, piece, "the checksum is wrong, so the bytes are torn or damaged")


def _refusal(parameters: Parameters, piece: Piece, reason: str) -> ParametersRefused:
    return ParametersRefused(f"version {parameters.version}, rank {piece.rank}: {reason}")
