"""The learner's half of a weight update without DeepSpeed: layout, shared files, server; read by the rollout's half."""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import random
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import Dtype
from learner.wire.layout import Share, checksum, file_name, file_prefix, pack, ranges, share_of
from learner.wire.publisher import Publisher, buffer_nbytes, remove_files
from rollout.communicator import BUFFER_NBYTES
from rollout.engine.staging import Staging
from rollout.errors import ParametersRefused
from rollout.types import Parameters, trailer

SHAPES = {"embed": (7, 5), "norm": (5,), "scalar": (1,), "up": (16, 8), "down": (3, 11, 3)}
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shares(rank: int, world: int) -> list[Share]:
    return [share_of(name, shape, rank, world) for name, shape in SHAPES.items()]


def model(seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}


def slices(weights: dict[str, torch.Tensor], rank: int, world: int) -> list[torch.Tensor]:
    return [weights[s.name].flatten()[s.start : s.start + s.count] for s in shares(rank, world)]


@pytest.fixture
def secret() -> Iterator[str]:
    made = os.urandom(16).hex()
    yield made
    remove_files(made)


def publishers(world: int, dtype: Dtype, secret: str, meeting: int = 1000) -> list[Publisher]:
    return [Publisher(rank, shares(rank, world), dtype, secret, "127.0.0.1", meeting) for rank in range(world)]


def publish(ranks: list[Publisher], version: int, weights: dict[str, torch.Tensor]) -> Parameters:
    parts = [one.publish(version, slices(weights, rank, len(ranks))) for rank, one in enumerate(ranks)]
    return replace(parts[0], pieces=tuple(part.pieces[0] for part in parts))


def tensors(parameters: Parameters, content: bytes) -> dict[str, torch.Tensor]:
    dtype = TORCH[parameters.dtype]
    return {
        spec.name: torch.frombuffer(bytearray(content[spec.offset : spec.offset + spec.nbytes]), dtype=dtype).view(
            spec.shape
        )
        for spec in parameters.tensors
    }


@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("shape", [(1,), (5,), (64,), (7, 5), (3, 11, 3), (100, 1)])
def test_shares_are_zero3s_equal_parts(shape: tuple[int, ...], world: int) -> None:
    size = math.prod(shape)
    parts = [share_of("w", shape, rank, world) for rank in range(world)]
    owned = [index for part in parts for index in range(part.start, part.start + part.count)]
    assert owned == list(range(size))
    assert all(part.count <= math.ceil(size / world) for part in parts)
    full = [part for part in parts if part.count]
    assert all(part.count == math.ceil(size / world) for part in full[:-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranges_cover_every_tensor_once(world: int, dtype: Dtype) -> None:
    specs, nbytes = pack(shares(0, world), dtype)
    assert all(spec.offset % 64 == 0 for spec in specs)
    assert nbytes == specs[-1].offset + math.ceil(specs[-1].nbytes / 64) * 64
    covered = np.zeros(nbytes, dtype=np.int64)
    for rank in range(world):
        found = ranges(specs, shares(rank, world), dtype)
        assert list(found) == sorted(found)
        for offset, count in found:
            covered[offset : offset + count] += 1
    for spec in specs:
        assert (covered[spec.offset : spec.offset + spec.nbytes] == 1).all()
    assert covered.max() == 1  # padding between tensors belongs to at most one


def test_one_rank_has_one_range() -> None:
    specs, _ = pack(shares(0, 1), "bfloat16")
    assert ranges(specs, shares(0, 1), "bfloat16") == ((0, specs[-1].offset + specs[-1].nbytes),)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 7, 1023, 4096, 4097])
def test_checksum_is_the_sum_of_words(length: int) -> None:
    data = random.Random(length).randbytes(length + 2)
    padded = data[2:] + bytes(-length % 4)
    expected = sum(struct.unpack(f"<{len(padded) // 4}I", padded)) % 2**64
    # the slice begins at an odd place, as slices in the middle of a version do
    assert checksum(np.frombuffer(data, dtype=np.uint8)[2:]) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_file_holds_exactly_the_parameters(world: int, dtype: Dtype, secret: str) -> None:
    ranks = publishers(world, dtype, secret)
    for version in range(4):
        weights = model(version)
        parameters = publish(ranks, version, weights)
        paths = {piece.path for piece in parameters.pieces}
        assert len(paths) == 1
        with open(paths.pop(), "rb") as file:
            content = file.read()
        assert content[parameters.nbytes :] == trailer(secret, version)
        for name, tensor in tensors(parameters, content).items():
            assert torch.equal(tensor, weights[name].to(TORCH[dtype]))
    for one in ranks:
        one.close()
    assert not glob.glob(f"/dev/shm/{file_prefix(secret)}*")


@pytest.mark.parametrize("world", [1, 3])
def test_rollouts_read_it_from_memory_and_over_the_network(world: int, secret: str) -> None:
    ranks = publishers(world, "bfloat16", secret)
    weights = model(7)
    parameters = publish(ranks, 7, weights)
    elsewhere = replace(
        parameters, pieces=tuple(replace(piece, path="/dev/shm/not-on-this-node") for piece in parameters.pieces)
    )
    staging = Staging()
    for notice in (parameters, elsewhere):
        with open(staging.fetch(notice), "rb") as file:
            content = file.read()
        for name, tensor in tensors(notice, content).items():
            assert torch.equal(tensor, weights[name].bfloat16())
    with pytest.raises(ParametersRefused, match="does not have this version"):
        staging.fetch(replace(elsewhere, version=8))
    with pytest.raises(ParametersRefused, match="does not have this version"):
        staging.fetch(replace(elsewhere, secret="0" * 32))
    staging.close()
    for one in ranks:
        one.close()


def ask(address: str, request: bytes) -> bytes:
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def test_server_tells_nothing_without_the_secret(secret: str) -> None:
    [one] = publishers(1, "float32", secret)
    piece = one.publish(3, slices(model(3), 0, 1)).pieces[0]
    right = {"secret": secret, "version": 3}
    assert len(ask(piece.address, json.dumps(right).encode() + b"\n")) == 8 + sum(count for _, count in piece.ranges)
    wrong = [
        right | {"secret": "0" * 32},
        right | {"secret": secret[:-1]},
        right | {"secret": "\u00e9" * 32},
        right | {"secret": None},
        right | {"version": 2},
        right | {"version": "3"},
        right | {"version": 5},
        {"version": 3},
        [secret, 3],
    ]
    for request in wrong:
        assert ask(piece.address, json.dumps(request).encode() + b"\n") == bytes(8), request
    for line in (b"\n", b"", b"\xff\xfe\n", b"x" * 5000 + b"\n"):
        assert ask(piece.address, line)[:8] in (bytes(8), b"")
    one.close()
    with pytest.raises(ConnectionRefusedError):
        ask(piece.address, json.dumps(right).encode() + b"\n")


def test_a_new_rendezvous_clears_what_killed_ranks_left(secret: str) -> None:
    old = publishers(2, "float32", secret, meeting=1000)
    publish(old, 0, model(0))  # and are killed: no close
    other = os.urandom(16).hex()
    [neighbour] = publishers(1, "float32", other)
    publish([neighbour], 0, model(0))
    new = publishers(2, "float32", secret, meeting=1001)
    publish(new, 0, model(0))
    found = sorted(os.path.basename(path) for path in glob.glob(f"/dev/shm/{file_prefix(secret)}*"))
    assert found == [file_name(secret, 1001, 0)]
    assert os.path.exists(f"/dev/shm/{file_name(other, 1000, 0)}")
    for one in [*new, neighbour]:
        one.close()
    for one in old:  # closing late must not fail because the files are gone
        one.close()


def test_files_are_private_and_their_names_keep_the_secret(secret: str) -> None:
    [one] = publishers(1, "float32", secret)
    path = one.publish(0, slices(model(0), 0, 1)).pieces[0].path
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert secret not in path
    one.close()


def test_secret_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32"):
        Publisher(0, shares(0, 1), "float32", "short", "127.0.0.1", 1)


def test_files_of_killed_runs_are_removed_and_those_of_living_ones_stay() -> None:
    from learner.wire.layout import PREFIX
    from learner.wire.publisher import FOLDER, remove_abandoned
    from rollout.abandoned import YOUNG_S

    old, held, young = (Path(FOLDER) / f"{PREFIX}test{os.getpid()}-{name}-0" for name in ("old", "held", "young"))
    holder = None
    try:
        for path in (old, held, young):
            path.write_bytes(b"x")
        holder = held.open("rb")
        fcntl.flock(holder, fcntl.LOCK_SH)
        young_ctime = young.stat().st_ctime
        remove_abandoned(now=young_ctime + YOUNG_S / 2)
        assert old.exists()
        assert young.exists()
        remove_abandoned(now=young_ctime + YOUNG_S * 2)
        assert not old.exists()
        assert held.exists()
    finally:
        if holder is not None:
            holder.close()
        for path in (old, held, young):
            path.unlink(missing_ok=True)


def test_a_piece_between_gpus_holds_the_largest_tensor() -> None:
    """vLLM's sender refuses to cut one: Qwen2.5-7B's embedding is larger than vLLM's own pieces."""
    specs, _ = pack([share_of("embed", (152064, 3584), 0, 8), share_of("norm", (3584,), 0, 8)], "bfloat16")
    assert buffer_nbytes(specs) == 152064 * 3584 * 2
    assert buffer_nbytes(specs[1:]) == BUFFER_NBYTES
