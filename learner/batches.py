"""How pieces of known sizes are cut into micro-batches and dealt to the ranks: numbers alone, no tokens.

Pieces are what cannot be divided: a prompt with its rows, or, in padded batches, a row by itself. Results are
deterministic: ranks that give the same numbers get the same micro-batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PADDING = 1.05
"""Positions of all padded batches over those of their pieces, at most."""
STEPS = tuple(int(1000 * (PADDING - 1) * 1.15**k) for k in range(40))
"""Thousandths by which the longest piece of a batch is longer than its shortest, at most: what a plan may choose."""
TRIED = 6
"""Of these, how many are balanced over the ranks."""
EVEN = 1.02
"""A plan whose ranks compute and wait this many times as long as they would compute alone is even enough."""
HALVINGS = 12
"""Of the range in which the least cost of the costliest micro-batch is looked for."""


@dataclass(frozen=True, slots=True)
class Dealt:
    """Which pieces are computed together, when and where."""

    rounds: tuple[tuple[tuple[int, ...], ...], ...]
    """[k][rank] indices of pieces; the same number of ranks in every round."""
    duration: float
    """The sum over the rounds of their costliest micro-batch: ranks wait for each other."""

    @property
    def order(self) -> tuple[int, float]:
        """The smaller the better: fewer rounds first, each of which gathers all parameters."""
        return len(self.rounds), self.duration


def fill(sizes: Sequence[int], costs: Sequence[float], ranks: int, budget: int) -> Dealt:
    """Fewest rounds that were found for pieces whose sizes add up, each at most `budget`.

    The costliest piece first, each into the cheapest micro-batch that has room; where that needs a further round, into
    the fullest that has room.
    """
    order = sorted(range(len(sizes)), key=lambda piece: (-costs[piece], piece))
    by_size = sorted(order, key=lambda piece: -sizes[piece])
    rounds = max(1, -(-sum(sizes) // (ranks * budget)))
    while True:
        for pieces, evenly in ((order, True), (by_size, False)):
            members = _placed(pieces, sizes, costs, ranks * rounds, budget, evenly)
            if members is not None:
                return _dealt(members, [sum(costs[piece] for piece in one) for one in members], ranks)
        rounds += 1  # ends: with one piece in each micro-batch everything fits


def _placed(
    order: Sequence[int], sizes: Sequence[int], costs: Sequence[float], count: int, budget: int, evenly: bool
) -> list[list[int]] | None:
    """Pieces in `count` micro-batches; None where one finds no room. `evenly`: by cost, otherwise by room."""
    members: list[list[int]] = [[] for _ in range(count)]
    room, cost = np.full(count, float(budget)), np.zeros(count)
    wanted = cost if evenly else room
    for piece in order:
        at = int(np.where(room >= sizes[piece], wanted, np.inf).argmin())
        if room[at] < sizes[piece]:
            return None
        members[at].append(piece)
        room[at] -= sizes[piece]
        cost[at] += costs[piece]
    return members


def _dealt(members: Sequence[Sequence[int]], costs: Sequence[float], ranks: int) -> Dealt:
    """Neighbours in cost run at the same time; every other round is dealt backwards to even out the ranks."""
    order = sorted(range(len(members)), key=lambda one: (-costs[one], tuple(members[one])))
    rounds = []
    for start in range(0, len(order), ranks):
        dealt = [tuple(members[one]) for one in order[start : start + ranks]]
        dealt += [()] * (ranks - len(dealt))
        rounds.append(tuple(dealt[:: -1 if len(rounds) % 2 else 1]))
    return Dealt(tuple(rounds), sum(costs[one] for one in order[::ranks]))


def pad(widths: Sequence[int], longest: Sequence[int], row_costs: Sequence[float], ranks: int, budget: int) -> Dealt:
    """Fewest rounds of padded batches in which at most PADDING times the pieces' own positions are computed.

    Piece i has `widths[i]` rows, each padded to `longest[i]` and then to its batch's longest; it fits the budget. A row
    in a batch whose longest piece is i costs `row_costs[i]`, which rises with the length.

    Pieces in order of length are cut into runs. Runs that hold as many rows as the budget allows are the fewest that
    there can be, where all pieces have as many rows; where that computes too much, runs also end before a piece that is
    too much shorter than the first. So, for m such fewest runs, there are at most m + log(longest / shortest) /
    log(PADDING) of them.
    """
    if not widths:
        return Dealt((((),) * ranks,), 0.0)
    cutter = _Cutter(widths, longest, row_costs, budget)
    cuts: dict[int | None, list[Run]] = {None: cutter.cut(None)}
    for step in STEPS:
        cuts[step] = cutter.cut(step)
        if len(cuts[step]) == len(cuts[None]):
            break  # larger ones end no run earlier
    fine = {step: runs for step, runs in cuts.items() if cutter.computed(runs) <= PADDING * cutter.least}
    rounds = -(-min(len(runs) for runs in fine.values()) // ranks)
    best = min(
        (cutter.dealt(runs, ranks) for runs in fine.values() if len(runs) <= rounds * ranks), key=lambda one: one.order
    )
    steps = [step for step, runs in cuts.items() if len(runs) <= rounds * ranks]
    for step in steps[:: -(-len(steps) // TRIED)]:
        if best.duration * ranks <= EVEN * cutter.cost:
            break
        even = cutter.evenly(step, rounds * ranks)
        if cutter.computed(even) <= PADDING * cutter.least:
            best = min(best, cutter.dealt(even, ranks), key=lambda one: one.order)
    return best


Run = tuple[int, int]
"""Pieces from a first one up to, and without, a last one, in order of length."""


class _Cutter:
    """Pieces in order of length, the longest first."""

    def __init__(self, widths: Sequence[int], longest: Sequence[int], row_costs: Sequence[float], budget: int) -> None:
        self._order = sorted(range(len(widths)), key=lambda piece: (-longest[piece], -widths[piece], piece))
        self._longest = [longest[piece] for piece in self._order]
        self._row_costs = [row_costs[piece] for piece in self._order]
        self._before = [0, *np.cumsum([widths[piece] for piece in self._order]).tolist()]
        self._most = [budget // length for length in self._longest]
        self.least = sum(widths[piece] * longest[piece] for piece in self._order)
        """Positions of the pieces by themselves."""
        self.cost = sum(self._costs([(piece, piece + 1) for piece in range(len(self._order))]))
        """What they cost by themselves."""

    def cut(self, step: int | None, cost: float | None = None) -> list[Run]:
        """Runs as long as budget, `step` (of STEPS; None for any length) and the `cost` of a micro-batch allow."""
        count = len(self._order)
        ends = self._ends(step)
        runs, start = [], 0
        while start < count:
            rows = self._most[start] if cost is None else min(self._most[start], int(cost / self._row_costs[start]))
            end = min(bisect_right(self._before, self._before[start] + rows) - 1, ends[start])
            runs.append((start, max(end, start + 1)))
            start = runs[-1][1]
        return runs

    def evenly(self, step: int | None, count: int) -> list[Run]:
        """At most `count` runs, the costliest of them as cheap as was found."""
        best = self.cut(step)
        low, high = self.cost / count, max(self._costs(best))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            runs = self.cut(step, middle)
            if len(runs) <= count:
                best, high = runs, middle
            else:
                low = middle
        return best

    def computed(self, runs: Sequence[Run]) -> int:
        """Positions, padding included."""
        return sum((self._before[end] - self._before[start]) * self._longest[start] for start, end in runs)

    def dealt(self, runs: Sequence[Run], ranks: int) -> Dealt:
        return _dealt([self._order[start:end] for start, end in runs], self._costs(runs), ranks)

    def _costs(self, runs: Sequence[Run]) -> list[float]:
        return [(self._before[end] - self._before[start]) * self._row_costs[start] for start, end in runs]

    def _ends(self, step: int | None) -> list[int]:
        """By piece, the first one after it that is too much shorter."""
        if step is None:
            return [len(self._order)] * len(self._order)
        lengths = np.array(self._longest)
        found: list[int] = np.searchsorted(-lengths * (1000 + step), -lengths * 1000, side="right").tolist()
        return found
