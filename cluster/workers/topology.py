"""Who is where: a node for every engine, rank and scoring actor of a plan. Pure: no Ray here.

Ranks take whole nodes in the order of their numbers, because every layer is gathered among all of them, and the ranks
of a sequence group share a node. Engines take what is left, each on one node. Everything has a place, or nothing has.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.workers.plan import Bundle, Plan, PlanError

Placement = Literal["pack", "spread"]
TOLERANCE = 1e-6
SHOWN = 8
"""Nodes that a line names at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node and its resources by Ray's names, such as {'CPU': 8, 'GPU': 4}."""

    id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    """What nobody has reserved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Node ids, by number of the worker; those of one node are neighbours."""

    engines: tuple[str, ...]
    ranks: tuple[str, ...]
    scorers: tuple[tuple[str, ...], ...]
    """By reward model, then by actor."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes that hold something."""
        return tuple(dict.fromkeys((*self.ranks, *self.engines, *itertools.chain(*self.scorers))))


class _NoRoom(Exception):
    """Something found no place."""


class _Rooms:
    """What is left of the nodes while things are placed."""

    def __init__(self, nodes: Sequence[Node], placement: Placement, as_if_empty: bool) -> None:
        self._left = {node.id: dict(node.total if as_if_empty else node.free) for node in nodes}
        self._spread = placement == "spread"
        self._used: set[str] = set()

    def place_each(self, wants: Mapping[str, float], count: int) -> tuple[str, ...]:
        """A node for each of `count` things: a used and nearly full one, or with 'spread' the emptiest."""
        found = []
        for _ in range(count):
            fits = {node: self._holds(node, wants) for node in self._left}
            possible = [node for node, times in fits.items() if times]
            if not possible:
                raise _NoRoom
            emptiest = max(possible, key=lambda node: fits[node])
            fullest = min(possible, key=lambda node: (node not in self._used, fits[node]))
            found.append(emptiest if self._spread else fullest)
            self._take(found[-1], wants, 1)
        return self._side_by_side(found)

    def place_together(self, wants: Mapping[str, float], count: int) -> tuple[str, ...]:
        """A node for each of `count` things on the fewest nodes, whole ones first; with 'spread' evenly on all."""
        if self._spread:
            return self.place_each(wants, count)
        found: list[str] = []
        while len(found) < count:
            need = count - len(found)
            fits = {node: times for node in self._left if (times := self._holds(node, wants))}
            if not fits:
                raise _NoRoom
            for_all = [node for node, times in fits.items() if times >= need]
            node = min(for_all, key=lambda node: fits[node]) if for_all else max(fits, key=lambda node: fits[node])
            placed = min(need, fits[node])
            self._take(node, wants, placed)
            found += [node] * placed
        return tuple(found)

    def _holds(self, node: str, wants: Mapping[str, float]) -> int:
        left = self._left[node]
        return min(
            (int((left.get(name, 0.0) + TOLERANCE) / amount) for name, amount in wants.items() if amount > TOLERANCE),
            default=1 << 20,
        )

    def _take(self, node: str, wants: Mapping[str, float], times: int) -> None:
        for name, amount in wants.items():
            self._left[node][name] = self._left[node].get(name, 0.0) - times * amount
        self._used.add(node)

    def _side_by_side(self, found: Sequence[str]) -> tuple[str, ...]:
        order = {node: number for number, node in enumerate(self._left)}
        return tuple(sorted(found, key=lambda node: order[node]))


def arrange(plan: Plan, nodes: Sequence[Node], placement: Placement, as_if_empty: bool = False) -> Places | None:
    """Places for all of a plan in what is free on the nodes, None where none are found.

    'pack' uses few nodes, 'spread' many. `as_if_empty`: as if nobody had reserved anything.
    """
    orders = (True, False)  # engines with several GPUs may need the choice
    found = (_arranged(plan, _Rooms(nodes, placement, as_if_empty), ranks_first) for ranks_first in orders)
    return next((places for places in found if places is not None), None)


def _arranged(plan: Plan, rooms: _Rooms, ranks_first: bool) -> Places | None:
    try:
        engines, ranks = _fleets(plan, rooms, ranks_first)
        scorers = tuple(rooms.place_each(each.each.wants, each.reward.workers) for each in plan.scorers)
    except _NoRoom:
        return None
    return Places(engines=engines, ranks=ranks, scorers=scorers)


def _fleets(plan: Plan, rooms: _Rooms, ranks_first: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if plan.shared:
        groups = rooms.place_together(plan.shared.times(plan.neighbours).wants, plan.ranks // plan.neighbours)
        pairs = tuple(node for node in groups for _ in range(plan.neighbours))
        return pairs, pairs
    engines = () if ranks_first else rooms.place_each(plan.rollout.wants, plan.rollout_workers)
    groups = rooms.place_together(plan.rank.times(plan.neighbours).wants, plan.ranks // plan.neighbours)
    ranks = tuple(node for node in groups for _ in range(plan.neighbours))
    engines = rooms.place_each(plan.rollout.wants, plan.rollout_workers) if ranks_first else engines
    return engines, ranks


def refuse_what_never_fits(plan: Plan, nodes: Sequence[Node], placement: Placement) -> None:
    """Raise PlanError where no place is found even with all nodes to itself; sums alone are looked at by `check`."""
    if arrange(plan, nodes, placement, as_if_empty=True) is not None:
        return
    wants = [
        ("rollout.workers", plan.rollout_workers, plan.rollout),
        ("learner.ranks", plan.ranks, plan.rank),
        *((f"{each.field}.workers", each.reward.workers, each.each) for each in plan.scorers),
    ]
    asked = " + ".join(f"{name} {count} x ({bundle})" for name, count, bundle in wants if count)
    beside = f", with learner.sequence_ranks {plan.neighbours} on one node" if plan.neighbours > 1 else ""
    raise PlanError(
        f"the nodes cannot hold {asked}{beside}, whatever the order: {_sizes(nodes)}; lower a number, or what each"
        " reserves"
    )


def _sizes(nodes: Sequence[Node]) -> str:
    """`2 of 24 CPUs, 6 GPUs, 1 of 8 CPUs`."""
    kinds: dict[str, int] = {}
    for node in nodes:
        size = str(Bundle(cpus=node.total.get("CPU", 0.0), gpus=node.total.get("GPU", 0.0)))
        kinds[size] = kinds.get(size, 0) + 1
    return ", ".join(f"{count} of {size}" for size, count in list(kinds.items())[:SHOWN])


def in_words(places: Places, addresses: Mapping[str, str]) -> list[str]:
    """A line for each node: `10.0.0.5: engines 0 to 7, rank 8`."""
    fleets = [("engine", places.engines), ("rank", places.ranks)]
    fleets += [("scoring actor", tuple(itertools.chain(*places.scorers)))]
    lines = []
    for node in places.nodes:
        parts = [_numbers(name, [number for number, at in enumerate(ats) if at == node]) for name, ats in fleets]
        lines.append(f"{addresses.get(node, node)}: {', '.join(part for part in parts if part)}")
    return lines


def _numbers(name: str, numbers: Sequence[int]) -> str:
    if not numbers:
        return ""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"{name} {first}"
    whole = last - first + 1 == len(numbers)
    return f"{name}s {first} to {last}" if whole else f"{name}s {', '.join(map(str, numbers))}"
