"""How pieces of known sizes are cut into micro-batches and dealt to the ranks: numbers alone, no tokens.

Pieces are what cannot be divided: a prompt with its rows, or, in padded batches, a row by itself. Results are
deterministic: ranks that give the same numbers get the same micro-batches.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

PADDING = 1.05
"""Positions of all padded batches over those of their pieces, at most."""
EVEN = 1.02
"""A plan that takes this many times as long as it would if no rank waited for another is even enough."""
UNEVEN = 1.2
"""One that takes longer than this may be shorter with a further round."""
ROUND = 1024
"""What a round costs beside its positions: a model of 7B gathered three times, at 300 GB/s on 8 ranks, takes as long as
so many positions at 400 TFLOP/s (arithmetic, not measured)."""
HALVINGS = 8
"""Of a range in which a bound is looked for."""
PLACES = 256
"""Places between pieces where the best cuts are looked for, about; all places where there are fewer pieces."""


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
    rounds: list[tuple[tuple[int, ...], ...]] = []
    for start in range(0, len(order), ranks):
        dealt = [tuple(members[one]) for one in order[start : start + ranks]]
        dealt += [()] * (ranks - len(dealt))
        rounds.append(tuple(dealt[:: -1 if len(rounds) % 2 else 1]))
    return Dealt(tuple(rounds), sum(costs[one] for one in order[::ranks]))


def pad(widths: Sequence[int], longest: Sequence[int], row_costs: Sequence[float], ranks: int, budget: int) -> Dealt:
    """Fewest rounds of padded batches that were found with at most PADDING times the pieces' own positions.

    One more where that shortens the whole by more than a round costs.

    Piece i has `widths[i]` rows, each padded to `longest[i]` and then to its batch's longest; it fits the budget. A row
    in a batch whose longest piece is i costs `row_costs[i]`, which rises with the length.

    Pieces in order of length are cut into runs. Runs that hold as many rows as the budget allows are the fewest that
    there can be, m, where all pieces have as many rows. Where they compute too much, the fewest runs that do not: at
    most m + log(longest / shortest) / log(PADDING), since no more can end because the next piece is PADDING times as
    short as their first.
    """
    if not widths:
        return Dealt((((),) * ranks,), 0.0)
    cutter = _Cutter(widths, longest, row_costs, budget)
    ways = cutter.ways()
    rounds = -(-min(len(runs) for runs in ways.values()) // ranks)
    best = _evenest(cutter, ways, rounds, ranks)
    if best.duration > UNEVEN * cutter.shortest(ranks):
        more = _evenest(cutter, ways, rounds + 1, ranks)
        best = more if more.duration + ROUND < best.duration else best
    return best


def _evenest(cutter: _Cutter, ways: Mapping[float, list[Run]], rounds: int, ranks: int) -> Dealt:
    """Of what fits into so many rounds, that with the shortest duration that was found."""
    fitting = {way: runs for way, runs in ways.items() if len(runs) <= rounds * ranks}
    dealt = [cutter.dealt(runs, ranks) for runs in fitting.values()]
    if min(one.duration for one in dealt) > EVEN * cutter.shortest(ranks):
        for way in sorted({min(fitting), max(fitting)}):
            dealt += [cutter.dealt(runs, ranks) for runs in cutter.even_runs(way, rounds * ranks)]
    return min(dealt, key=lambda one: one.duration)


Run = tuple[int, int]
"""Pieces from a first one up to, and without, a last one, in order of length."""
LONGEST = math.inf
"""The price of a run at which all are as long as they may be."""


class _Cutter:
    """Pieces in order of length, the longest first, and ways to cut them into runs that fit the budget."""

    def __init__(self, widths: Sequence[int], longest: Sequence[int], row_costs: Sequence[float], budget: int) -> None:
        self._order = sorted(range(len(widths)), key=lambda piece: (-longest[piece], -widths[piece], piece))
        self._longest = [longest[piece] for piece in self._order]
        self._row_costs = [row_costs[piece] for piece in self._order]
        self._before = [0, *np.cumsum([widths[piece] for piece in self._order]).tolist()]
        self._rows = [budget // length for length in self._longest]
        singles = [(piece, piece + 1) for piece in range(len(self._order))]
        self._alone = self._costs(singles)
        """What the pieces cost by themselves."""
        self._most = int(PADDING * self._computed(singles))
        """Positions that may be computed."""

    def shortest(self, ranks: int) -> float:
        """No duration is shorter."""
        return max(sum(self._alone) / ranks, *self._alone)

    def ways(self) -> dict[float, list[Run]]:
        """Runs by their price: with few positions, then fewer runs, as long as they do not compute too much."""
        longest = self._cut(LONGEST)
        if self._computed(longest) <= self._most:
            return {LONGEST: longest}
        alike = np.array(self._longest) / PADDING
        ends = np.searchsorted(-np.array(self._longest), -alike, side="right").tolist()
        found, low, high = {0.0: self._longest_runs(math.inf, ends)}, 0.0, float(self._most)
        for _ in range(HALVINGS):
            price = math.sqrt((1 + low) * (1 + high)) - 1
            runs = self._cut(price)
            if self._computed(runs) <= self._most:
                low, found[price] = price, runs
            else:
                high = price
        return found

    def even_runs(self, price: float, count: int) -> list[list[Run]]:
        """At most `count` runs, the costliest of them cheaper and cheaper, that do not compute too much."""
        found, low, high = [], sum(self._alone) / count, max(self._costs(self._cut(price)))
        for _ in range(HALVINGS):
            cost = (low + high) / 2
            runs = self._cut(price, cost)
            if len(runs) <= count and self._computed(runs) <= self._most:
                high = cost
                found.append(runs)
            else:
                low = cost
        return found

    def dealt(self, runs: Sequence[Run], ranks: int) -> Dealt:
        return _dealt([self._order[start:end] for start, end in runs], self._costs(runs), ranks)

    def _cut(self, price: float, cost: float = math.inf) -> list[Run]:
        """The runs whose positions and `price` for each run add up to the least, none of more than `cost`."""
        if price == LONGEST:
            return self._longest_runs(cost, [len(self._order)] * len(self._order))
        return self._cheapest_runs(price, cost)

    def _longest_runs(self, cost: float, ends: Sequence[int]) -> list[Run]:
        """Each as long as the budget, `cost` and the `ends` by its first piece allow."""
        runs, start = [], 0
        while start < len(self._order):
            rows = min(self._rows[start], cost / self._row_costs[start])
            end = min(bisect_right(self._before, self._before[start] + rows) - 1, ends[start])
            runs.append((start, max(end, start + 1)))
            start = runs[-1][1]
        return runs

    def _cheapest_runs(self, price: float, cost: float) -> list[Run]:
        """By dynamic programming over the places where runs may begin and end, from the last to the first."""
        places, firsts = self._places, self._places[:-1]
        before, longest = np.array(self._before)[places], np.array(self._longest)[firsts]
        rows = np.minimum(np.array(self._rows)[firsts], cost / np.array(self._row_costs)[firsts])
        last = np.searchsorted(before, before[:-1] + rows, side="right") - 1
        last = np.maximum(last, np.arange(1, len(places))).tolist()
        least, chosen = np.zeros(len(places)), [0] * len(firsts)
        for place in range(len(firsts) - 1, -1, -1):
            reach = slice(place + 1, last[place] + 1)
            sums = (before[reach] - before[place]) * longest[place] + least[reach]
            best = int(sums.argmin())
            chosen[place], least[place] = place + 1 + best, sums[best] + price
        runs, place = [], 0
        while place < len(firsts):
            runs.append((places[place], places[chosen[place]]))
            place = chosen[place]
        return runs

    @cached_property
    def _places(self) -> list[int]:
        """Between all pieces, or, where there are many, between small sets of pieces of nearly equal length."""
        count, places = len(self._order), [0]
        if count <= PLACES:
            return [*range(count + 1)]
        for piece in range(1, count):
            first = places[-1]
            rows = self._before[piece + 1] - self._before[first]
            many = rows > min(self._before[-1] // PLACES, self._rows[first] // 8)
            if many or self._longest[piece] * (1 + 1 / PLACES) < self._longest[first]:
                places.append(piece)
        return [*places, count]

    def _computed(self, runs: Sequence[Run]) -> int:
        """Positions, padding included."""
        return sum((self._before[end] - self._before[start]) * self._longest[start] for start, end in runs)

    def _costs(self, runs: Sequence[Run]) -> list[float]:
        return [(self._before[end] - self._before[start]) * self._row_costs[start] for start, end in runs]
