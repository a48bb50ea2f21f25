"""A published version is brought to this node whole, or refused in one line; nothing half-way, nothing left behind."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.engine.staging import Staging, checksum
from rollout.errors import ParametersRefused
from rollout.seeds import sample_seed
from rollout.types import Parameters, trailer
from tests.publishing import SECRET, Publisher, bytes_of, naive_checksum, with_wrong_checksum


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Odd sizes: pieces begin and end anywhere, and a small tensor leaves the last rank nothing."""
    torch.manual_seed(seed)
    shapes = {"embed": (37, 11), "norm": (1,), "bias": (3,), "linear": (64, 33)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def read(path: str, parameters: Parameters) -> dict[str, torch.Tensor]:
    content = bytearray(bytes_of(path))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[parameters.dtype]
    return {
        spec.name: torch.frombuffer(content[spec.offset : spec.offset + spec.nbytes], dtype=dtype).view(spec.shape)
        for spec in parameters.tensors
    }


@pytest.fixture
def staging() -> Iterator[Staging]:
    made = Staging(fetch_timeout_s=20.0, idle_timeout_s=5.0)
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("layout", ["one file", "a file each", "remote"])
def test_the_bytes_arrive_by_every_way(
    tmp_path: Path, staging: Staging, layout: str, ranks: int, dtype: torch.dtype
) -> None:
    publisher = Publisher(tmp_path, ranks, layout)
    sent = tensors(dtype)
    parameters = publisher.publish(3, sent)
    path = staging.fetch(parameters)
    got = read(path, parameters)
    assert all(torch.equal(got[name], sent[name]) for name in sent)
    assert bytes_of(path)[parameters.nbytes :] == trailer(SECRET, 3)
    assert [server.requests for server in publisher.servers] == [int(layout == "remote")] * ranks
    publisher.close()


def test_one_file_is_used_as_it_is(tmp_path: Path, staging: Staging) -> None:
    publisher = Publisher(tmp_path, ranks=2)
    assert staging.fetch(publisher.publish(1, tensors())) == str(tmp_path / "all")
    publisher.close()


def test_later_versions_reuse_the_place_and_may_have_another_size(tmp_path: Path, staging: Staging) -> None:
    publisher = Publisher(tmp_path, 2, "a file each")
    paths = set()
    for version, sent in enumerate([tensors(seed=1), tensors(seed=2), {"one": torch.ones(3)}, tensors(seed=3)]):
        parameters = publisher.publish(version, sent)
        path = staging.fetch(parameters)
        paths.add(path)
        assert all(torch.equal(read(path, parameters)[name], sent[name]) for name in sent)
    assert len(paths) == 1
    publisher.close()


def test_local_and_remote_pieces_together(tmp_path: Path, staging: Staging) -> None:
    publisher = Publisher(tmp_path, 3, "a file each")
    sent = tensors()
    parameters = publisher.publish(0, sent)
    os.unlink(parameters.pieces[1].path)
    got = read(staging.fetch(parameters), parameters)
    assert all(torch.equal(got[name], sent[name]) for name in sent)
    assert [server.requests for server in publisher.servers] == [0, 1, 0]
    publisher.close()


@pytest.mark.parametrize("layout", ["one file", "a file each", "remote"])
def test_a_wrong_checksum_is_refused(tmp_path: Path, staging: Staging, layout: str) -> None:
    publisher = Publisher(tmp_path, 2, layout)
    parameters = publisher.publish(5, tensors())
    with pytest.raises(ParametersRefused, match="version 5, rank 1: the checksum is wrong"):
        staging.fetch(with_wrong_checksum(parameters, rank=1))
    assert staging.fetch(parameters)
    publisher.close()


def test_one_changed_byte_is_refused(tmp_path: Path, staging: Staging) -> None:
    publisher = Publisher(tmp_path, 2)
    parameters = publisher.publish(5, tensors())
    path = Path(parameters.pieces[0].path)
    content = bytearray(path.read_bytes())
    content[parameters.tensors[-1].offset + 17] ^= 4
    path.write_bytes(content)
    with pytest.raises(ParametersRefused, match="checksum"):
        staging.fetch(parameters)
    publisher.close()


@pytest.mark.parametrize("damage", ["foreign", "older version", "no trailer", "empty"])
def test_a_file_without_our_mark_is_not_read(tmp_path: Path, staging: Staging, damage: str) -> None:
    publisher = Publisher(tmp_path)
    parameters = publisher.publish(7, tensors())
    whole = (tmp_path / "all").read_bytes()
    content = whole[: parameters.nbytes]
    marks = {"foreign": trailer("f" * 32, 7), "older version": trailer(SECRET, 5), "no trailer": b"", "empty": b""}
    (tmp_path / "all").write_bytes(b"" if damage == "empty" else content + marks[damage])
    got = read(staging.fetch(parameters), parameters)  # the server still has the version
    assert torch.equal(got["linear"], tensors()["linear"])
    assert publisher.servers[0].requests == 1
    publisher.close()


@pytest.mark.parametrize("change", [{"secret": "f" * 32}, {"version": 8}])
def test_a_server_without_this_version_refuses(tmp_path: Path, staging: Staging, change: dict[str, object]) -> None:
    publisher = Publisher(tmp_path, 1, "remote")
    parameters = replace(publisher.publish(7, tensors()), **change)
    with pytest.raises(ParametersRefused, match=r"rank 0: .* does not have this version"):
        staging.fetch(parameters)
    publisher.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [(b"\x01", "ended early"), ((99).to_bytes(8, "little"), "offers 99 bytes"), (None, "timed out")],
)
def test_a_server_that_misbehaves_is_refused(tmp_path: Path, answer: bytes | None, message: str) -> None:
    publisher = Publisher(tmp_path, 1, "remote")
    parameters = publisher.publish(0, tensors())
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        piece = replace(parameters.pieces[0], address=address)
        staging = Staging(fetch_timeout_s=10.0, idle_timeout_s=10.0 if answer else 0.3)
        if answer is not None:

            def serve() -> None:
                connection, _ = server.accept()
                connection.recv(1000)
                connection.sendall(answer)
                connection.close()

            threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ParametersRefused, match=message):
            staging.fetch(replace(parameters, pieces=(piece,)))
        staging.close()
    publisher.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"version": -1}, "from 0 on"),
        ({"pieces": ()}, "with pieces"),
        ({"nbytes": 64}, "leave the file"),
    ],
)
def test_a_notice_that_contradicts_itself_is_refused(
    tmp_path: Path, staging: Staging, change: dict[str, object], message: str
) -> None:
    publisher = Publisher(tmp_path, 2)
    parameters = publisher.publish(2, tensors())
    with pytest.raises(ParametersRefused, match=message):
        staging.fetch(replace(parameters, **change))
    publisher.close()


def test_every_byte_needs_one_piece(tmp_path: Path, staging: Staging) -> None:
    publisher = Publisher(tmp_path, 2)
    parameters = publisher.publish(2, tensors())
    first, second = parameters.pieces
    with pytest.raises(ParametersRefused, match="no piece holds all bytes of 'embed'"):
        staging.fetch(replace(parameters, pieces=(first,)))
    with pytest.raises(ParametersRefused, match="pieces overlap"):
        staging.fetch(replace(parameters, pieces=(first, second, first)))
    wrong = replace(parameters.tensors[0], shape=(5,))
    with pytest.raises(ParametersRefused, match="'embed' has a wrong length"):
        staging.fetch(replace(parameters, tensors=(wrong,)))
    publisher.close()


def test_checksum_equals_the_plain_sum() -> None:
    content = np.random.default_rng(0).integers(0, 256, size=5000, dtype=np.uint8)
    ranges = [(0, 0), (0, 1), (3, 2), (6, 1001), (1027, 4), (1031, 2047), (4990, 10)]
    expected = sum(naive_checksum(content[o : o + n].tobytes()) for o, n in ranges) % 2**64
    assert checksum(content, ranges) == expected


def test_close_gives_the_memory_back_and_may_be_repeated(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path, 2, "a file each")
    staging = Staging()
    path = staging.fetch(publisher.publish(0, tensors()))
    assert os.path.exists(path)
    staging.close()
    staging.close()
    assert not os.path.exists(path)
    publisher.close()


def test_sample_seeds_are_stable_and_apart() -> None:
    seeds = {sample_seed(group, index) for group in range(200) for index in range(50)}
    assert len(seeds) > 9_990  # 10,000 draws out of 2**32 seldom meet
    assert all(0 <= seed < 2**32 for seed in seeds)
    # the first outputs of splitmix64 from state 0, as its authors give them, halves folded
    assert [sample_seed(0, 0), sample_seed(0, 1)] == [0xE220A839 ^ 0x7B1DCDAF, 0x6E789E6A ^ 0xA1B965F4]
