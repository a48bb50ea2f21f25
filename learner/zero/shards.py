"""One rank's checkpoint: its slices of the float32 parameters and of AdamW's moments, and its random states.

A file per rank, tensors and plain values only, read with torch's safe loader. Slices are flat, so a checkpoint of K
ranks can be read by any other number: a rank takes what it needs out of every file.
"""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.errors import LearnerError
from learner.wire.layout import share_of

FORMAT = 1
STATES = ("master", "exp_avg", "exp_avg_sq")
_NAME = re.compile(r"learner-(\d+)-of-(\d+)\.pt")


@dataclass(frozen=True, slots=True)
class Section:
    """Parameters that the optimizer updates as one flat tensor (a sub-group of ZeRO-3)."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """Elements of each whole parameter; the flat tensors hold ceil(size / ranks) of each, padded at the end."""
    tensors: dict[str, torch.Tensor]
    """Flat float32 tensors by state; only 'master' before the first update."""
    steps: float
    """Updates AdamW has made."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Everything a rank needs to go on exactly."""

    rank: int
    world: int
    sections: tuple[Section, ...]
    random: dict[str, Any]


def file_of(folder: str, rank: int, world: int) -> Path:
    return Path(folder) / f"learner-{rank:04d}-of-{world:04d}.pt"


def write(folder: str, shard: Shard) -> None:
    """Write a rank's file into `folder`, which must exist."""
    content = {
        "format": FORMAT,
        "rank": shard.rank,
        "world": shard.world,
        "sections": [
            {"names": list(s.names), "sizes": list(s.sizes), "steps": s.steps, **s.tensors} for s in shard.sections
        ],
        "random": shard.random,
    }
    torch.save(content, file_of(folder, shard.rank, shard.world))


def read(folder: str, rank: int, world: int, wanted: Sequence[Section], host: torch.device) -> Shard:
    """A rank's state for sections named and sized as `wanted`, in `host` memory. Raises LearnerError.

    The random states are those of the rank's own file; a rank that the checkpoint did not have gets none.
    """
    saved = _ranks_in(folder)
    if saved == world:
        shard = _open(file_of(folder, rank, world), host)
        if [(s.names, s.sizes) for s in shard.sections] == [(w.names, w.sizes) for w in wanted]:
            return shard
    shards = [_open(file_of(folder, other, saved), host) for other in range(saved)]
    sections = tuple(_collect(shards, section, rank, world, folder) for section in wanted)
    return Shard(rank, world, sections, shards[rank].random if rank < saved else {})


def _ranks_in(folder: str) -> int:
    found = [match for path in Path(folder).glob("learner-*.pt") if (match := _NAME.fullmatch(path.name))]
    worlds = {int(match[2]) for match in found}
    if len(worlds) != 1:
        raise LearnerError(
            f"'{folder}' holds no learner checkpoint, or parts of several; choose another to resume from"
        )
    return worlds.pop()


def _open(path: Path, host: torch.device) -> Shard:
    try:
        content = torch.load(path, map_location=host, weights_only=True, mmap=True)
        sections = tuple(
            Section(
                names=tuple(section["names"]),
                sizes=tuple(section["sizes"]),
                tensors={state: section[state] for state in STATES if state in section},
                steps=section["steps"],
            )
            for section in content["sections"]
        )
        return Shard(content["rank"], content["world"], sections, content["random"])
    except FileNotFoundError as error:
        raise LearnerError(
            f"'{path}' is missing; a checkpoint is read by as many learner.ranks as wrote it where every rank sees"
            " only its own disk: set learner.ranks back, or share the run folder"
        ) from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise LearnerError(f"'{path}' cannot be read: {' '.join(str(error).split())[:200]}") from error


def _collect(shards: Sequence[Shard], wanted: Section, rank: int, world: int, folder: str) -> Section:
    """One section of `rank` out of `world`, put together from the slices of all shards."""
    steps, states = 0.0, list[str]()
    parts: dict[str, list[torch.Tensor]] = {state: [] for state in STATES}
    for name, size in zip(wanted.names, wanted.sizes, strict=True):
        source = next((s for s in shards[0].sections if name in s.names), None)
        if source is None or source.sizes[source.names.index(name)] != size:
            raise LearnerError(
                f"the checkpoint in '{folder}' has no '{name}' of {size} elements; is model.path another?"
            )
        steps, states = source.steps, list(source.tensors)
        for state in states:
            parts[state].append(_slice(shards, name, size, state, rank, world))
    return Section(wanted.names, wanted.sizes, {state: torch.cat(parts[state]) for state in states}, steps)


def _slice(shards: Sequence[Shard], name: str, size: int, state: str, rank: int, world: int) -> torch.Tensor:
    """[ceil(size / world)] elements of one parameter for `rank`, zero-padded at the end."""
    target = torch.zeros(-(-size // world))
    mine = share_of(name, (size,), rank, world)
    for shard in shards:
        section = next(s for s in shard.sections if name in s.names)
        index = section.names.index(name)
        offset = sum(-(-other // shard.world) for other in section.sizes[:index])
        theirs = share_of(name, (size,), shard.rank, shard.world)
        first, last = max(mine.start, theirs.start), min(mine.start + mine.count, theirs.start + theirs.count)
        if first < last:
            begin = offset + first - theirs.start
            target[first - mine.start : last - mine.start] = section.tensors[state][begin : begin + last - first]
    return target


def random_states(device_state: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """States of torch, the device, numpy and python, as tensors and plain values."""
    kind, numbers, internal = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "device": device_state(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "python": (kind, numbers, internal),
    }


def restore_random_states(states: dict[str, Any], set_device_state: Callable[[torch.Tensor], None]) -> None:
    """Set what `random_states` took; nothing where a rank has none."""
    if not states:
        return
    torch.set_rng_state(states["torch"].clone())
    set_device_state(states["device"].clone())
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    kind, numbers, internal = states["python"]
    random.setstate((kind, tuple(numbers), internal))


def seed_all(seed: int) -> None:
    """Seed torch on every device, numpy and python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
