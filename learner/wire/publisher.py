"""New parameters to the rollout engines.

Shared memory: every rank writes its own ZeRO-3 slices, cast to the wire type, straight to their place in a file of
/dev/shm that all ranks of a node share; no collective, no rank that holds the whole model. A small server gives the
same bytes to other nodes. GPU transports: `trainer` hands vLLM's own weight transfer a source over the slices.
"""

from __future__ import annotations

import fcntl
import glob
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from configs.schema import Dtype
from learner.errors import LearnerError
from learner.wire.layout import PREFIX, Share, checksum, file_name, file_prefix, pack, ranges
from learner.wire.server import PieceServer
from rollout.abandoned import is_abandoned
from rollout.communicator import BUFFER_NBYTES, refuse_unusable
from rollout.types import TRAILER_NBYTES, Parameters, Piece, TensorSpec, trailer

FOLDER = "/dev/shm"
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the two shared files, open, with a view on each of this rank's slices and ranges."""

    path: str
    handle: int
    memory: mmap.mmap
    slices: tuple[torch.Tensor, ...]
    ranges: tuple[npt.NDArray[np.uint8], ...]


class Publisher:
    """One rank's part of every published version. Not for several threads."""

    def __init__(
        self, rank: int, shares: Sequence[Share], dtype: Dtype, secret: str, address: str, meeting: int
    ) -> None:
        """`shares` are in the order of the version; `address` is this node's, for the server; `meeting` the port
        of the ranks' rendezvous. Raises ValueError for a secret that is not 32 ASCII characters."""
        trailer(secret, 0)
        self._rank, self._dtype, self._secret, self._meeting = rank, dtype, secret, meeting
        self._shares = tuple(shares)
        self._specs, self._nbytes = pack(self._shares, dtype)
        self._ranges = ranges(self._specs, self._shares, dtype)
        self._slots: dict[int, Slot] = {}
        self._live: dict[int, int] = {}  # version in each file, absent while it is being written
        remove_files(secret, keep=meeting)
        remove_abandoned()
        self._server = PieceServer(address, secret, self._parts)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return self._specs

    def publish(self, version: int, tensors: Sequence[torch.Tensor]) -> Parameters:
        """Write this rank's slices ([count] each, any device and type) as `version`. Raises LearnerError."""
        turn = version % 2
        self._live.pop(turn, None)
        slot = self._slots[turn] if turn in self._slots else self._open(version)
        mark = slot.memory
        mark[self._nbytes :] = bytes(TRAILER_NBYTES)
        for target, tensor in zip(slot.slices, tensors, strict=True):
            target.copy_(tensor)
        total = sum(checksum(part) for part in slot.ranges) % 2**64
        mark[self._nbytes :] = trailer(self._secret, version)
        self._live[turn] = version
        piece = Piece(
            rank=self._rank, path=slot.path, address=self._server.address, ranges=self._ranges, checksum=total
        )
        return Parameters(
            version=version,
            dtype=self._dtype,
            nbytes=self._nbytes,
            tensors=self._specs,
            pieces=(piece,),
            secret=self._secret,
        )

    def close(self) -> None:
        """Stop serving and remove this rendezvous' files; readers that hold them open keep their bytes."""
        self._server.close()
        for slot in self._slots.values():
            _unlink(slot.path)
            os.close(slot.handle)
        self._slots.clear()
        self._live.clear()

    def _open(self, version: int) -> Slot:
        path = os.path.join(FOLDER, file_name(self._secret, self._meeting, version))
        size = self._nbytes + TRAILER_NBYTES
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # reserves the pages now: a full /dev/shm would otherwise end the process at the first write
            os.posix_fallocate(handle, 0, size)
            memory = mmap.mmap(handle, size)
            # held until this process ends, however it ends: see remove_abandoned
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError as error:
            os.close(handle)
            _unlink(path)
            raise LearnerError(
                f"{FOLDER} has no room for {size / 2**20:.0f} MiB of parameters ({error.strerror}); enlarge it (two"
                " versions must fit), or use learner.transport nccl or ipc"
            ) from error
        wire = TORCH_DTYPES[self._dtype]
        slices = tuple(
            torch.frombuffer(memory, dtype=wire, count=share.count, offset=spec.offset + share.start * wire.itemsize)
            if share.count
            else torch.empty(0, dtype=wire)
            for spec, share in zip(self._specs, self._shares, strict=True)
        )
        parts = tuple(np.frombuffer(memory, dtype=np.uint8, count=count, offset=start) for start, count in self._ranges)
        self._slots[version % 2] = Slot(path, handle, memory, slices, parts)
        return self._slots[version % 2]

    def _parts(self, version: int) -> Sequence[memoryview]:
        turn = version % 2
        if self._live.get(turn) != version:
            return ()
        return [part.data for part in self._slots[turn].ranges]


def remove_files(secret: str, keep: int | None = None) -> None:
    """Remove this node's shared files of a run: left by killed ranks, or all where `keep` is None."""
    prefix = os.path.join(FOLDER, file_prefix(secret))
    for path in glob.glob(prefix + "*"):
        if keep is None or not path.startswith(f"{prefix}{keep}-"):
            _unlink(path)


def remove_abandoned(now: float | None = None) -> None:
    """Remove this user's shared files of any run whose processes were all killed: nobody holds them any more."""
    for path in glob.glob(os.path.join(FOLDER, PREFIX + "*")):
        if is_abandoned(path, now or time.time()):
            _unlink(path)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return  # a rank beside this one was faster


class EngineClient(Protocol):
    """How rank 0 reaches the rollout engines in a GPU transfer: vLLM's VLLMWeightSyncClient, method for method.

    Calls block. Whoever makes the client decides who leads: one that calls the engines, or one whose methods do
    nothing because the driver calls the engines at the same time.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class Trainer(Protocol):
    """The part of vLLM's trainer-side transfer engine that we use."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


def nccl_trainer(source: Any, client: EngineClient, rank: int, address: str, port: int, world: int) -> Trainer:
    """Join vLLM's NCCL transfer; `world` counts rank 0 of the learner and every rollout GPU. Called on all ranks."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info = NCCLTrainerInitInfo(
        master_address=address,
        master_port=port,
        world_size=world,
        rank=rank,
        packed_buffer_size_bytes=BUFFER_NBYTES,
    )
    trainer: Any = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
    if rank == 0:
        try:
            refuse_unusable(trainer.model_update_group)
        except RuntimeError as error:
            raise LearnerError(str(error)) from error
    return trainer


def buffer_nbytes(specs: Sequence[TensorSpec]) -> int:
    """Size of a piece by CUDA IPC: as large as the largest tensor, which vLLM's sender refuses to cut."""
    return max(BUFFER_NBYTES, *(spec.nbytes for spec in specs))


def ipc_trainer(source: Any, client: EngineClient, rank: int, buffer: int) -> Trainer:
    """Join vLLM's CUDA IPC transfer, in pieces of `buffer` bytes so that no GPU holds a second whole model. Called on
    all ranks."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def weight_source(
    specs: Sequence[TensorSpec], dtype: Dtype, gather: Callable[[], Iterator[tuple[str, torch.Tensor]]]
) -> Any:
    """vLLM's view of the parameters: names, wire type and shapes, and whole tensors gathered one after the other.

    `gather` is a collective of all ranks, which vLLM iterates on each of them in the same order.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    wire = TORCH_DTYPES[dtype]

    class ZeroSource(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(spec.name, wire, spec.shape) for spec in specs]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in gather():
                # a copy of its own: the gathered parameter is given back to ZeRO when the next one is asked for
                yield name, tensor.to(wire, copy=True)

    return ZeroSource()
