"""Shared-prompt attention by PyTorch's FlexAttention, for GPUs: one kernel over all packed positions.

The kernel skips every block of 128 queries and 128 keys in which nobody looks at anybody, and computes no position
twice. It is compiled for each length, so lengths are rounded up to a few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
LENGTHS_PER_OCTAVE = 8
"""A micro-batch is padded to one of so many lengths between each power of two and the next."""
KERNELS = 64
"""Compiled kernels that are kept: lengths times windows."""
AT_ONCE = 2**26
"""Pairs of positions that are looked at together while a mask is made: 64 MiB."""

Rule = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""FlexAttention's question: batch, head, places of query and key to whether the one looks at the other."""


@dataclass(frozen=True, slots=True)
class FlexMap:
    """Who attends to whom in a micro-batch of N packed positions, padded to L."""

    layout: torch.Tensor
    """i64[L] -1 for padding"""
    row: torch.Tensor
    """i64[L] 0 for a prompt"""
    position: torch.Tensor
    """i64[L] place in the sequence of prompt and answer"""
    count: int
    """N"""
    made: dict[int | None, BlockMask] = field(default_factory=dict)
    """Masks by window: made by the first layer that needs them, used by the others."""

    def mask(self, window: int | None) -> BlockMask:
        """The mask of a layer with this sliding window; None for a layer that sees everything before it."""
        if window not in self.made:
            self.made[window] = _block_mask(self._rule(window), len(self.layout), self.layout.device)
        return self.made[window]

    def _rule(self, window: int | None) -> Rule:
        layout, row, position = self.layout, self.row, self.position

        def looks(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            own = (layout[query] == layout[key]) & ((row[key] == 0) | (row[key] == row[query]))
            # padding looks at itself alone; a row of scores that are all hidden would have no softmax
            return own & (key <= query) & ((layout[query] >= 0) | (key == query))

        def looks_near(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return looks(batch, head, query, key) & (position[query] - position[key] < window)

        return looks if window is None else looks_near

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scaling: float | None
    ) -> torch.Tensor:
        """[1, H, N, D] over [1, H or fewer, N, D] -> [1, N, H, D]."""
        padding = (0, 0, 0, len(self.layout) - self.count)
        query, key, value = (functional.pad(one, padding) for one in (query, key, value))
        kernel = _compiled() if query.is_cuda else flex_attention
        grouped = key.shape[1] != query.shape[1]
        attended = kernel(query, key, value, block_mask=self.mask(window), scale=scaling, enable_gqa=grouped)
        return attended[:, :, : self.count].transpose(1, 2)


def flex_map(segments: npt.NDArray[np.int32], positions: npt.NDArray[np.int64], device: torch.device) -> FlexMap:
    """From the segments [N, 2] of (layout, row) and the positions [N] of a micro-batch."""
    layout, row = segments.T.astype(np.int64)
    padding = _rounded(len(segments)) - len(segments)

    def padded(array: npt.NDArray[np.int64], filler: int) -> torch.Tensor:
        return torch.from_numpy(np.pad(array, (0, padding), constant_values=filler)).to(device)

    return FlexMap(
        layout=padded(layout, -1),
        row=padded(row, 0),
        position=padded(positions, 0),
        count=len(segments),
    )


def _rounded(length: int) -> int:
    step = max(BLOCK, 2 ** (length - 1).bit_length() // (2 * LENGTHS_PER_OCTAVE))
    return -(-length // step) * step


def _block_mask(rule: Rule, length: int, device: torch.device) -> BlockMask:
    """The blocks in which anybody looks at anybody, and those in which everybody looks at everybody.

    A strip of queries after the other, so that no mask of all pairs of positions ever exists.
    """
    places = torch.arange(length, device=device)
    some, every = [], []
    for strip in places.split(max(1, AT_ONCE // (length * BLOCK)) * BLOCK):
        looks = rule(None, None, strip[:, None], places).unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        some.append(looks.any(3).any(1))
        every.append(looks.all(3).all(1))
    full = torch.cat(every)
    return BlockMask.from_kv_blocks(
        *_listed(torch.cat(some) & ~full),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=rule,
        seq_lengths=(length, length),
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool[Q, K] to how many there are in each row, i32[1, 1, Q], and where, i32[1, 1, Q, K], those first."""
    where = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], where.int()[None, None]


@cache
def _compiled() -> Any:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNELS)
    return torch.compile(flex_attention, dynamic=False)
