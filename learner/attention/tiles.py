"""Shared-prompt attention by plain matrix products, for CPUs: tile by tile, each small enough for a core's cache.

A tile is a prompt, some answers of one prompt with similar lengths, or a run of one long answer's queries. Its scores
are one batched product, and they are computed again in the backward pass, so that nothing grows with the square of a
length. All heads that share a key stand in one matrix. PyTorch's own kernel for CPUs takes one and a half times as long
or more for answers of 30 to 200 tokens.

Scores and sums are float32 for a bfloat16 model. Its products may round their inputs to bfloat16: queries, keys and
values are that already, probabilities would be rounded as flash attention rounds them. The permission lets PyTorch take
oneDNN, which where it was measured stayed in float32, twice as fast as the library that PyTorch takes without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.function import once_differentiable

from learner.attention.segments import Part, parts_of

SCORES = 2**18
"""Scores of a tile, about: 1 MiB in float32, which fits a core's own cache."""
FEWEST_QUERIES = 128
"""A very long answer's tile has at least so many, or its products would be too thin: with 32 the attention of a row of
8k tokens takes half as long again."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Q queries of each of B runs of positions, padded; all look at K keys, of their prompt and of their own run."""

    source: torch.Tensor
    """i64[B * Q] packed position of each query; N, a place of its own, for padding"""
    keys: torch.Tensor
    """i64[B * K] packed positions: for each run the prompt's, then its own up to its last query"""
    prompt: slice
    """Packed positions of the prompt that are looked at; of none for a tile of the prompt itself."""
    runs: tuple[slice, ...]
    """Packed positions of each run's own keys; padding stands behind them."""
    queries: int
    bias: torch.Tensor
    """f32[Q, 1, last columns] -inf where a query does not look, else 0; it sees all earlier columns."""


@dataclass(frozen=True, slots=True)
class TileMap:
    """Who attends to whom in a micro-batch of N packed positions."""

    parts: tuple[Part, ...]
    made: dict[int | None, tuple[Tile, ...]] = field(default_factory=dict)
    """Tiles by window: made by the first layer that needs them, used by the others."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scaling: float | None
    ) -> torch.Tensor:
        """[1, H, N, D] over [1, H or fewer, N, D] -> [1, N, H, D]."""
        if window not in self.made:
            self.made[window] = tuple(_tiles(self.parts, query.shape[1], window))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended: torch.Tensor = _Attention.apply(query, key, value, self.made[window], scale)
        return attended


def tile_map(segments: npt.NDArray[np.int32]) -> TileMap:
    """From the segments [N, 2] of (layout, row) of a micro-batch."""
    return TileMap(tuple(parts_of(segments)))


def _tiles(parts: Sequence[Part], heads: int, window: int | None) -> Iterator[Tile]:
    nowhere = sum(part.length for part in parts)
    nothing = Part(layout=-1, row=0, start=0, length=0)
    prompts = {part.layout: part for part in parts if part.row == 0}
    answers: dict[int, list[Part]] = {}
    for part in parts:
        if part.row:
            answers.setdefault(part.layout, []).append(part)

    def several(prompt: Part, members: Sequence[Part]) -> Iterator[Tile]:
        """Members in descending order of length, each with all its queries; or some queries of the only one."""
        longest = members[0].length
        step = longest
        if len(members) == 1:
            most = max(FEWEST_QUERIES, SCORES // (heads * (prompt.length + longest)))
            step = -(-longest // -(-longest // most))
        for first in range(0, longest, step):
            last = min(first + step, longest)
            yield _tile(prompt, members, first, last, nowhere, window)

    for layout, prompt in prompts.items():
        yield from several(nothing, [prompt])
        left = sorted(answers.get(layout, ()), key=lambda part: (-part.length, part.start))
        while left:
            # as many as fit, but no fewer than the tiles after it will have
            fit = max(1, SCORES // (heads * left[0].length * (prompt.length + left[0].length)))
            count = -(-len(left) // -(-len(left) // fit))
            yield from several(prompt, left[:count])
            left = left[count:]


def _tile(prompt: Part, members: Sequence[Part], first: int, last: int, nowhere: int, window: int | None) -> Tile:
    """Of queries `first` to `last` of each member, without the keys that a window hides from all of them."""
    behind = 0 if window is None else max(0, prompt.length + first - window + 1)
    of_prompt, of_own = min(behind, prompt.length), max(0, behind - prompt.length)
    places = np.arange(last)
    own = np.stack([np.where(places < part.length, part.start + places, nowhere) for part in members])
    before = np.arange(prompt.start + of_prompt, prompt.start + prompt.length)
    query = torch.arange(first, last)[:, None]
    if window is None:
        hidden = torch.arange(first, last) > query
    else:
        distance = prompt.length + query - torch.arange(behind, prompt.length + last)
        hidden = (distance < 0) | (distance >= window)
    return Tile(
        source=torch.from_numpy(own[:, first:].ravel()),
        keys=torch.from_numpy(np.concatenate([np.concatenate([before, row[of_own:]]) for row in own])),
        prompt=slice(prompt.start + of_prompt, prompt.start + prompt.length),
        runs=tuple(slice(part.start + of_own, part.start + min(last, part.length)) for part in members),
        queries=last - first,
        bias=torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)[:, None],
    )


class _Attention(torch.autograd.Function):
    """Inside, heads that share keys stand side by side: queries [KV, N + 1, R * D] of KV key heads and R = H / KV.

    Position N is padding: zeros where it is read, and whatever lands there is dropped.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: tuple[Tile, ...], scale: float
    ) -> torch.Tensor:
        """TileMap.attend."""
        ctx.save_for_backward(query, key, value)
        ctx.tiles, ctx.scale = tiles, scale
        _, heads, count, _ = query.shape
        size = value.shape[-1]
        q, k, v = _by_key_head(query, key.shape[1]), _by_key_head(key), _by_key_head(value)
        out = v.new_empty(len(v), count + 1, heads // len(v) * size)
        with _fast_products(query.dtype):
            for tile in tiles:
                queries, keys, values = _cut(tile, q, k, v)
                probabilities = _probabilities(tile, queries, keys, scale)
                out.index_copy_(1, tile.source, torch.bmm(probabilities, values).view(len(v), -1, out.shape[2]))
        return out[:, :count].unflatten(2, (-1, size)).transpose(0, 1).to(value.dtype).reshape(1, count, heads, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Softmax's gradient to the scores s = scale * q k': p * (dp - sum of p * dp), where dp = do v'."""
        query, key, value = ctx.saved_tensors
        q, k, v = _by_key_head(query, key.shape[1]), _by_key_head(key), _by_key_head(value)
        do = _by_key_head(grads[0].transpose(1, 2), key.shape[1])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with _fast_products(query.dtype):
            for tile in ctx.tiles:
                queries, keys, values = _cut(tile, q, k, v)
                outputs = _rows(do, tile.source, len(queries), values.shape[2])
                p = _probabilities(tile, queries, keys, ctx.scale)
                ds = torch._softmax_backward_data(torch.bmm(outputs, values.transpose(1, 2)), p, -1, p.dtype)
                dq.index_copy_(1, tile.source, _scaled(ds, keys, ctx.scale).view(len(dq), -1, dq.shape[2]))
                _add_keys(dk, tile, _scaled(ds.transpose(1, 2), queries, ctx.scale))
                _add_keys(dv, tile, torch.bmm(p.transpose(1, 2), outputs))
        return _by_head(dq, query), _by_head(dk, key), _by_head(dv, value), None, None


def _by_key_head(packed: torch.Tensor, key_heads: int | None = None) -> torch.Tensor:
    """[1, H, N, D] -> [KV, N + 1, R * D] in the type of the products, with zeros behind the end."""
    _, heads, count, size = packed.shape
    key_heads = key_heads or heads
    dtype = torch.float64 if packed.dtype == torch.float64 else torch.float32
    made = packed.new_empty(key_heads, count + 1, heads // key_heads, size, dtype=dtype)
    made[:, :count].copy_(packed[0].unflatten(0, (key_heads, -1)).transpose(1, 2))
    made[:, count].zero_()
    return made.flatten(2)


def _by_head(made: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The other way, in the type and shape of `like`."""
    _, _, count, size = like.shape
    by_head = made[:, :count].unflatten(2, (-1, size)).transpose(1, 2)
    return by_head.to(like.dtype, memory_format=torch.contiguous_format).reshape(like.shape)


def _rows(packed: torch.Tensor, positions: torch.Tensor, batch: int, size: int) -> torch.Tensor:
    """The positions of [KV, N + 1, ...] as a batch of matrices whose rows are `size` long."""
    return packed.index_select(1, positions).view(batch, -1, size)


def _cut(
    tile: Tile, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [KV * B, Q * R, D], keys [KV * B, K, D] and values [KV * B, K, D]."""
    batch = len(k) * len(tile.runs)
    return (
        _rows(q, tile.source, batch, k.shape[2]),
        _rows(k, tile.keys, batch, k.shape[2]),
        _rows(v, tile.keys, batch, v.shape[2]),
    )


def _probabilities(tile: Tile, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """[KV * B, Q * R, K]"""
    scores = _scaled(queries, keys.transpose(1, 2), scale)
    by_query = scores.view(len(scores), tile.queries, -1, scores.shape[2])
    by_query[..., -tile.bias.shape[2] :] += tile.bias  # up to five times as fast as masked_fill_
    return torch.softmax(scores, -1)


def _scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * a b, without a pass for the scale."""
    return torch.baddbmm(a.new_empty(()).expand(len(a), a.shape[1], b.shape[2]), a, b, beta=0, alpha=scale)


def _add_keys(total: torch.Tensor, tile: Tile, found: torch.Tensor) -> None:
    """Add a tile's gradients [KV * B, K, D] to the packed positions of its keys."""
    by_run = found.view(len(total), len(tile.runs), -1, found.shape[2])
    length = tile.prompt.stop - tile.prompt.start
    if length:
        total[:, tile.prompt] += by_run[:, :, :length].sum(1)
    for number, run in enumerate(tile.runs):
        total[:, run] += by_run[:, number, length : length + run.stop - run.start]


@contextmanager
def _fast_products(dtype: torch.dtype) -> Iterator[None]:
    """Lets products of float32 tensors round their inputs to bfloat16, for a model that is bfloat16 itself."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    if dtype == torch.bfloat16:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
