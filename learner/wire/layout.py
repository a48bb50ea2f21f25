"""Where every byte of a published version lies. Pure: no files, no torch.

A version is one run of bytes: the tensors one after the other, each beginning at a multiple of 64. A rank holds of
every tensor one flat slice (ZeRO-3 cuts the flattened tensor into equal parts; the last one may be short or empty).
A shared file is the version followed by the trailer of rollout/types.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.schema import Dtype
from rollout.types import TensorSpec

ALIGNMENT = 64
ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
PREFIX = "grao-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of one parameter that a rank holds."""

    name: str
    shape: tuple[int, ...]
    start: int
    """First element in the flattened parameter."""
    count: int
    """Elements; 0 where the parameter has too few for this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A run of one parameter's elements that checkpoints and engines know as a tensor with a name of its own."""

    name: str
    shape: tuple[int, ...]
    start: int
    """First element in the flattened parameter."""


Parts = Mapping[str, tuple[Part, ...]]
"""Of every parameter, by the name that the learner's model gives it; learner/model/experts.py."""


def share_of(name: str, shape: tuple[int, ...], rank: int, world: int) -> Share:
    """ZeRO-3's cut: every rank gets ceil(elements / world), the last ones what is left."""
    size = int(np.prod(shape, dtype=np.int64))
    part = -(-size // world)
    start = min(size, rank * part)
    return Share(name=name, shape=shape, start=start, count=min(size, start + part) - start)


def pack(shares: Sequence[Share], dtype: Dtype) -> tuple[tuple[TensorSpec, ...], int]:
    """Place the parameters in the order given. Returns their places and the length of the version in bytes."""
    item, offset, specs = ITEM_BYTES[dtype], 0, []
    for share in shares:
        nbytes = int(np.prod(share.shape, dtype=np.int64)) * item
        specs.append(TensorSpec(name=share.name, shape=share.shape, offset=offset, nbytes=nbytes))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(specs), offset


def as_parts(specs: Sequence[TensorSpec], parts: Parts) -> tuple[TensorSpec, ...]:
    """The same bytes under the names of `parts`."""
    found = []
    for spec in specs:
        item = spec.nbytes // int(np.prod(spec.shape, dtype=np.int64))
        for part in parts[spec.name]:
            nbytes = int(np.prod(part.shape, dtype=np.int64)) * item
            found.append(
                TensorSpec(name=part.name, shape=part.shape, offset=spec.offset + part.start * item, nbytes=nbytes)
            )
    return tuple(found)


def ranges(specs: Sequence[TensorSpec], shares: Sequence[Share], dtype: Dtype) -> tuple[tuple[int, int], ...]:
    """(offset, nbytes) of a rank's slices, ascending; those with nothing but padding between them are joined."""
    item, found = ITEM_BYTES[dtype], list[tuple[int, int]]()
    end_of_last = -ALIGNMENT
    for spec, share in zip(specs, shares, strict=True):
        if share.count == 0:
            continue
        first = spec.offset + share.start * item
        nbytes = share.count * item
        # a gap is only padding if the slice before ends its tensor and this one begins its own
        if found and share.start == 0 and first - end_of_last < ALIGNMENT:
            found[-1] = (found[-1][0], first + nbytes - found[-1][0])
        else:
            found.append((first, nbytes))
        whole = share.start * item + nbytes == spec.nbytes
        end_of_last = first + nbytes if whole else -ALIGNMENT
    return tuple(found)


def checksum(data: npt.NDArray[np.uint8]) -> int:
    """Sum of a range as little-endian u32 words, zero-padded at the end, modulo 2**64."""
    whole = data.size // 4 * 4
    words = data[:whole].view("<u4")
    total = int(words.sum(dtype=np.uint64))
    tail = bytes(data[whole:]).ljust(4, b"\0")
    return (total + int.from_bytes(tail, "little")) % 2**64


def file_prefix(secret: str) -> str:
    """What the names of a run's shared files begin with. A hash: names are public, the secret is not."""
    return PREFIX + hashlib.sha256(secret.encode("ascii")).hexdigest()[:20] + "-"


def file_name(secret: str, meeting: int, version: int) -> str:
    """Name of the shared file of a version. Two files take turns, so one is whole while the other is written.

    `meeting` tells the ranks' rendezvous apart: a restarted group must not write into files of the one before.
    """
    return f"{file_prefix(secret)}{meeting}-{version % 2}"
