"""A plain publisher for the tests of the receiving side: files and servers as `rollout.engine.staging` describes them.

Independent of the learner's publisher on purpose: whole tensors, no shards, every step written out.
"""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rollout.types import Parameters, Piece, TensorSpec

SECRET = "0123456789abcdef" * 2


def naive_checksum(content: bytes) -> int:
    padded = content + bytes(-len(content) % 4)
    return sum(int.from_bytes(padded[i : i + 4], "little") for i in range(0, len(padded), 4)) % 2**64


def cut(specs: tuple[TensorSpec, ...], item: int, rank: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Every tensor is divided over the ranks by elements, as ZeRO-3 does, so that most tensors straddle pieces."""
    ranges = []
    for spec in specs:
        count = spec.nbytes // item
        start, stop = count * rank // ranks, count * (rank + 1) // ranks
        ranges.append((spec.offset + start * item, (stop - start) * item))
    return tuple(ranges)


class Server:
    """Answers with the piece of the one version that it holds."""

    def __init__(self, secret: str, version: int, answer: bytes) -> None:
        self.requests = 0
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                outer.requests += 1
                asked = json.loads(self.rfile.readline())
                good = asked == {"secret": secret, "version": version}
                self.wfile.write(len(answer).to_bytes(8, "little") + answer if good else bytes(8))

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Publisher:
    """Writes versions into `folder`. `layout`: one file for all ranks, or one each, or none that a reader can open."""

    def __init__(self, folder: Path, ranks: int = 1, layout: str = "one file", secret: str = SECRET) -> None:
        self.folder, self.ranks, self.layout, self.secret = folder, ranks, layout, secret
        self.servers: list[Server] = []

    def publish(self, version: int, tensors: Mapping[str, torch.Tensor]) -> Parameters:
        specs, content = self._pack(tensors)
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        item = next(iter(tensors.values())).element_size()
        mark = self.secret.encode() + version.to_bytes(8, "little") + bytes(24)
        pieces = []
        for rank in range(self.ranks):
            ranges = cut(specs, item, rank, self.ranks)
            parts = [content[offset : offset + nbytes] for offset, nbytes in ranges]
            server = Server(self.secret, version, b"".join(parts))
            self.servers.append(server)
            path = self.folder / ("all" if self.layout == "one file" else f"rank{rank}")
            own = bytearray(content if self.layout == "one file" else len(content))
            for (offset, nbytes), part in zip(ranges, parts, strict=True):
                own[offset : offset + nbytes] = part
            if self.layout != "remote":
                path.write_bytes(bytes(own) + mark)
            pieces.append(
                Piece(
                    rank=rank,
                    path=str(path),
                    address=server.address,
                    ranges=ranges,
                    checksum=sum(naive_checksum(part) for part in parts) % 2**64,
                )
            )
        return Parameters(
            version=version,
            dtype=dtype,
            nbytes=len(content),
            tensors=specs,
            pieces=tuple(pieces),
            secret=self.secret,
        )

    def close(self) -> None:
        for server in self.servers:
            server.close()
        self.servers.clear()

    @staticmethod
    def _pack(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[TensorSpec, ...], bytes]:
        specs, content = [], bytearray()
        for name, tensor in tensors.items():
            raw = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
            specs.append(TensorSpec(name=name, shape=tuple(tensor.shape), offset=len(content), nbytes=len(raw)))
            content += raw + bytes(-len(raw) % 64)
        return tuple(specs), bytes(content)


def with_wrong_checksum(parameters: Parameters, rank: int) -> Parameters:
    """The same notice, but one rank's checksum is off by one."""
    pieces = [
        replace(piece, checksum=(piece.checksum + 1) % 2**64) if piece.rank == rank else piece
        for piece in parameters.pieces
    ]
    return replace(parameters, pieces=tuple(pieces))


def bytes_of(path: str) -> bytes:
    return np.fromfile(path, dtype=np.uint8).tobytes()
