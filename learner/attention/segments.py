"""The runs of positions that a packed micro-batch consists of."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Part(NamedTuple):
    """A run of packed positions: a prompt (row 0), or one of its answers."""

    layout: int
    row: int
    start: int
    length: int


def parts_of(segments: npt.NDArray[np.int32]) -> list[Part]:
    """From the segments [N, 2] of (layout, row) of a micro-batch, in their order."""
    changes = np.any(segments[1:] != segments[:-1], axis=1)
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(segments)]
    runs = itertools.pairwise(bounds)
    return [Part(int(segments[start, 0]), int(segments[start, 1]), start, end - start) for start, end in runs]
