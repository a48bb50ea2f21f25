"""Which rows are computed together, and where: a pure plan made alike on every rank.

A group's rows share one layout, [prompt | row 0 | row 1 | ...]; each row but its last token, whose hidden state would
predict nothing. For a model in which prompts cannot be shared, each row has its prompt to itself, and a micro-batch is
a padded batch (learner/attention/padded.py). Layouts go into micro-batches of at most the token budget
(learner/batches.py). Every rank gets the same number of micro-batches, because ZeRO-3's ranks gather parameters
together; the k-th ones of all ranks cost about the same, because they wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from learner.batches import EVEN, Dealt, fill, pad
from learner.errors import LearnerError
from learner.types import MicroBatch, Row

Ints = npt.NDArray[np.int64]
PAIRS_PER_POSITION = 12_288.0
"""Attention's query-key pairs that cost as much as one position in the linear layers: 6 * hidden size, at 2048."""
MOST_SPLITS = 16
"""Groups cut in two for balance's sake, at most; each cut computes a prompt once more."""
MOST_PLACED = 8192
"""Layouts placed for the sake of such cuts, at most: where there are many, they are even without."""


class PackingError(LearnerError):
    """A row does not fit into a micro-batch."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """A prompt with some of its group's rows."""

    prompt: tuple[int, ...]
    rows: tuple[int, ...]
    """Indices into the step's list of rows, ascending."""
    positions: int
    cost: float
    longest: int
    """Positions of its longest sequence where each row has its prompt to itself; 0 where they share it."""

    @property
    def blocks(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Each prompt as it is computed, and the rows behind it."""
        return [(self.prompt, (row,)) for row in self.rows] if self.longest else [(self.prompt, self.rows)]


class Plan(Sequence[tuple[MicroBatch, ...]]):
    """[rank][k]. A rank's micro-batches are laid out when they are asked for, because each rank needs its own only."""

    def __init__(self, dealt: Dealt, layouts: Sequence[_Layout], rows: Sequence[Row]) -> None:
        self._rounds, self._layouts, self._rows = dealt.rounds, layouts, rows
        self._made: dict[int, tuple[MicroBatch, ...]] = {}

    def __len__(self) -> int:
        return len(self._rounds[0])

    @overload
    def __getitem__(self, rank: int) -> tuple[MicroBatch, ...]: ...

    @overload
    def __getitem__(self, rank: slice) -> tuple[tuple[MicroBatch, ...], ...]: ...

    def __getitem__(self, rank: int | slice) -> tuple[MicroBatch, ...] | tuple[tuple[MicroBatch, ...], ...]:
        if isinstance(rank, slice):
            return tuple(self[one] for one in range(len(self))[rank])
        at = range(len(self))[rank]
        if at not in self._made:
            own = ([self._layouts[piece] for piece in dealt[at]] for dealt in self._rounds)
            self._made[at] = tuple(_micro_batch(layouts, self._rows) for layouts in own)
        return self._made[at]


def plan(
    rows: Sequence[Row],
    prompts: Sequence[tuple[int, ...]],
    ranks: int,
    token_budget: int,
    whole_groups: bool = False,
    share_prompts: bool = True,
    pairs_per_position: float = PAIRS_PER_POSITION,
) -> Plan:
    """Divide a step's rows: [rank][k], the same k (at least 1) on every rank, every row exactly once.

    `prompts` are token ids by group index. A micro-batch has at most `token_budget` positions. Where there is nothing
    left for a rank, its micro-batch has no rows and no targets, and one position so that the forward pass runs.
    `whole_groups` keeps a group's rows in one micro-batch, for a loss that couples them. Without `share_prompts` each
    row has its prompt to itself, and the budget counts a micro-batch's rows times its longest sequence.
    `pairs_per_position`: how many query-key pairs of attention cost as much as a position in the linear layers.
    Raises PackingError for a row that no micro-batch can hold, ValueError for an empty prompt or row.
    """
    if share_prompts:
        layouts = _shared_layouts(rows, prompts, token_budget, pairs_per_position)
    else:
        layouts = _separate_layouts(rows, prompts, token_budget, whole_groups, pairs_per_position)
    if whole_groups:
        _refuse_parts(layouts, rows, token_budget)
    if not share_prompts:
        longest = [layout.longest for layout in layouts]
        widths = [len(layout.rows) for layout in layouts]
        row_costs = [one + one**2 / 2 / pairs_per_position for one in longest]
        return Plan(pad(widths, longest, row_costs, ranks, token_budget), layouts, rows)
    best, best_layouts = _filled(layouts, ranks, token_budget), layouts
    cuts = min(ranks, MOST_SPLITS, MOST_PLACED // max(1, len(layouts))) if ranks > 1 and not whole_groups else 0
    for _ in range(cuts):
        if best.duration * ranks <= EVEN * sum(layout.cost for layout in best_layouts):
            break
        layouts = _split_costliest(layouts, rows, pairs_per_position)
        found = _filled(layouts, ranks, token_budget)
        if found.order < best.order:
            best, best_layouts = found, layouts
    return Plan(best, best_layouts, rows)


def together(rows: Sequence[Row], prompts: Sequence[tuple[int, ...]], share_prompts: bool) -> MicroBatch:
    """All rows in one micro-batch, whatever that pads: to see what rows do to each other. Not for a step."""
    unbounded, pairs = 2**40, PAIRS_PER_POSITION
    if share_prompts:
        return _micro_batch(_shared_layouts(rows, prompts, unbounded, pairs), rows)
    return _micro_batch(_separate_layouts(rows, prompts, unbounded, False, pairs), rows)


def _filled(layouts: Sequence[_Layout], ranks: int, budget: int) -> Dealt:
    return fill([layout.positions for layout in layouts], [layout.cost for layout in layouts], ranks, budget)


def _members(rows: Sequence[Row], prompts: Sequence[tuple[int, ...]]) -> dict[int, list[int]]:
    """Indices of rows by group, the longest first."""
    members: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if not row.token_ids or not prompts[row.group]:
            raise ValueError(f"row {index} of group {row.group}: an answer and its prompt have at least one token each")
        members.setdefault(row.group, []).append(index)
    return {
        group: sorted(each, key=lambda index: (-len(rows[index].token_ids), index)) for group, each in members.items()
    }


def _shared_layouts(
    rows: Sequence[Row], prompts: Sequence[tuple[int, ...]], budget: int, pairs: float
) -> list[_Layout]:
    """One layout a group where it fits the budget, else as few as first-fit needs, longest rows first."""
    layouts = []
    for group, indices in _members(rows, prompts).items():
        prompt = prompts[group]
        room = budget - len(prompt)
        parts: list[tuple[int, list[int]]] = []
        for index in indices:
            need = len(rows[index].token_ids) - 1
            _refuse_row(rows[index], len(prompt) + need, budget)
            fit = next((k for k, (used, _) in enumerate(parts) if used + need <= room), None)
            if fit is None:
                parts.append((need, [index]))
            else:
                parts[fit] = (parts[fit][0] + need, [*parts[fit][1], index])
        layouts += [_layout(prompt, part, rows, pairs, shared=True) for _, part in parts]
    return layouts


def _separate_layouts(
    rows: Sequence[Row], prompts: Sequence[tuple[int, ...]], budget: int, whole_groups: bool, pairs: float
) -> list[_Layout]:
    """One layout a row, or one a group."""
    layouts = []
    for group, indices in _members(rows, prompts).items():
        _refuse_row(rows[indices[0]], len(prompts[group]) + len(rows[indices[0]].token_ids) - 1, budget)
        parts = [indices] if whole_groups else [[index] for index in indices]
        layouts += [_layout(prompts[group], part, rows, pairs, shared=False) for part in parts]
    return layouts


def _refuse_row(row: Row, need: int, budget: int) -> None:
    if need > budget:
        raise PackingError(
            f"learner.tokens_per_micro_batch is {budget}, but a row of group {row.group} needs {need} positions;"
            " raise it to that or more"
        )


def _refuse_parts(layouts: Sequence[_Layout], rows: Sequence[Row], budget: int) -> None:
    """Raises PackingError where a group fell into several layouts, or its one layout is too large."""
    seen: set[int] = set()
    for layout in layouts:
        group = rows[layout.rows[0]].group
        if group in seen or layout.positions > budget:
            need = layout.positions
            if group in seen:
                need = len(layout.prompt) + sum(len(row.token_ids) - 1 for row in rows if row.group == group)
            raise PackingError(
                f"learner.tokens_per_micro_batch is {budget}, but group {group}, whose rows belong together, needs"
                f" {need} positions; raise it to that or more"
            )
        seen.add(group)


def _layout(
    prompt: tuple[int, ...], indices: Sequence[int], rows: Sequence[Row], pairs_per_position: float, shared: bool
) -> _Layout:
    lengths = [len(rows[index].token_ids) - 1 for index in indices]
    longest = 0 if shared else len(prompt) + max(lengths)
    positions = len(prompt) + sum(lengths) if shared else len(lengths) * longest
    computed = 1 if shared else len(lengths)
    pairs = computed * len(prompt) ** 2 / 2 + sum(length * (len(prompt) + length / 2) for length in lengths)
    cost = positions + pairs / pairs_per_position
    return _Layout(prompt=prompt, rows=tuple(sorted(indices)), positions=positions, cost=cost, longest=longest)


def _split_costliest(layouts: Sequence[_Layout], rows: Sequence[Row], pairs: float) -> list[_Layout]:
    """The same layouts with the costliest that has two rows or more cut in two halves of equal length, nearly."""
    divisible = [layout for layout in layouts if len(layout.rows) > 1]
    if not divisible:
        return list(layouts)
    whole = min(divisible, key=lambda layout: (-layout.cost, layout.rows))
    halves: tuple[list[int], list[int]] = ([], [])
    lengths = [0, 0]
    for index in sorted(whole.rows, key=lambda index: (-len(rows[index].token_ids), index)):
        # by count where lengths tie, so that rows of one token do not all land in one half
        lighter = int((lengths[1], len(halves[1])) < (lengths[0], len(halves[0])))
        halves[lighter].append(index)
        lengths[lighter] += len(rows[index].token_ids) - 1
    kept = [layout for layout in layouts if layout is not whole]
    return kept + [_layout(whole.prompt, half, rows, pairs, shared=True) for half in halves]


def _micro_batch(layouts: Sequence[_Layout], rows: Sequence[Row]) -> MicroBatch:
    """Lay out positions and targets."""
    if not layouts:
        layouts = [_Layout(prompt=(0,), rows=(), positions=1, cost=0.0, longest=0)]
    ids = {index: _ints(rows[index].token_ids) for layout in layouts for index in layout.rows}
    blocks = [block for layout in layouts for block in layout.blocks]
    token_ids: list[Ints] = []
    positions: list[Ints] = []
    segments: list[tuple[int, int, int]] = []  # layout, row, length
    predict_at: list[Ints] = []
    start = 0
    for number, (prompt, members) in enumerate(blocks):
        length = len(prompt)
        prompt_end = start + length - 1
        token_ids.append(_ints(prompt))
        positions.append(np.arange(length))
        segments.append((number, 0, length))
        start += length
        for place, index in enumerate(members, start=1):
            computed = ids[index][:-1]
            predict_at += [np.array([prompt_end]), np.arange(start, start + len(computed))]
            token_ids.append(computed)
            positions.append(np.arange(length, length + len(computed)))
            segments.append((number, place, len(computed)))
            start += len(computed)
    own = [rows[index] for layout in layouts for index in layout.rows]
    lengths = [len(row.token_ids) for row in own]
    owner, part, count = zip(*segments, strict=True)
    return MicroBatch(
        token_ids=_joined(token_ids, np.int64),
        positions=_joined(positions, np.int64),
        segments=np.repeat(np.array([owner, part], dtype=np.int32), count, axis=1).T.copy(),
        predict_at=_joined(predict_at, np.int64),
        targets=_joined([ids[index] for layout in layouts for index in layout.rows], np.int64),
        weights=np.repeat(np.array([row.weight / len(row.token_ids) for row in own], dtype=np.float32), lengths),
        kl_weights=np.repeat(np.array([row.kl_weight / len(row.token_ids) for row in own], dtype=np.float32), lengths),
        behavior_logprobs=_joined([_behavior(row) for row in own], np.float32),
        row_of=np.repeat(np.arange(len(own)), lengths),
        rows=tuple(index for layout in layouts for index in layout.rows),
    )


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """One array of this type; numpy's own concatenate refuses to join nothing."""
    return np.concatenate([np.empty(0, dtype), *parts], dtype=dtype, casting="unsafe")


def _ints(ids: tuple[int, ...]) -> Ints:
    return np.fromiter(ids, np.int64, len(ids))


def _behavior(row: Row) -> npt.NDArray[np.float32]:
    if row.logprobs is None:
        return np.full(len(row.token_ids), np.nan, np.float32)
    return np.fromiter(row.logprobs, np.float32, len(row.logprobs))
