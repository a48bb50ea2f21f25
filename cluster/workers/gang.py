"""The places of a run on Ray's nodes: one placement group for all of them, so that a run has everything or nothing.

Two runs that start on one cluster never hold half each of what both need: the one that comes later waits.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.workers.plan import Bundle, Plan, check
from cluster.workers.topology import SHOWN, Node, Places, arrange, in_words, refuse_what_never_fits
from configs.schema import ClusterConfig

NODE = "ray.io/node-id"  # the label that Ray gives to every node
READY_S = 10.0
"""Time for Ray to make a group on places that are free. Longer, and somebody else was faster."""
PAUSE_S = 2.0
"""Between two looks at what is free, and up to as much more, so that two runs do not look at the same time for ever."""

Seat = tuple[PlacementGroup, int]
"""A bundle of a group."""


class PlacementError(RuntimeError):
    """Ray cannot be reached or cannot hold the run. One line that names the field and the fix."""


class Gang:
    """All places of a run, from `reserve` to `release`."""

    def __init__(self, plan: Plan, config: ClusterConfig, say: Callable[[str], None]) -> None:
        """`say` gets a line where the run has to wait."""
        self._plan, self._config, self._say = plan, config, say
        self._groups: list[PlacementGroup] = []
        self._places = Places(engines=(), ranks=(), scorers=())
        self._addresses: dict[str, str] = {}
        self._engines: list[Seat] = []
        self.ranks: list[Seat] = []
        self.scorers: list[list[Seat]] = []

    async def reserve(self) -> None:
        """Wait until everything has its place, for cluster.wait_s at most.

        Raises PlanError where the nodes can never hold the run, PlacementError where they did not in time.
        """
        deadline, waiting = time.monotonic() + self._config.wait_s, False
        while True:
            nodes = living_nodes()
            if not self._config.grows:
                check(self._plan, [node.total for node in nodes])
                refuse_what_never_fits(self._plan, nodes, self._config.placement)
            places = arrange(self._plan, nodes, self._config.placement)
            if places is not None and await self._take(places):
                self._addresses = {node.id: node.address for node in nodes}
                return
            if time.monotonic() >= deadline:
                raise PlacementError(
                    f"cluster.wait_s: {self._want()}, and within {self._config.wait_s:g} s there was no place for it;"
                    f" free are {_free(living_nodes())}; wait longer, or lower rollout.workers or learner.ranks"
                )
            if not waiting:
                self._say(f"waiting for free places: {self._want()}, free are {_free(nodes)}")
                waiting = True
            await self._ask(places is None)

    def engine(self, number: int) -> Seat:
        """The place of an engine. Where its node is gone, a new one on any node, once there is room."""
        node = self._places.engines[number]
        if self._engines[number][0] is self._groups[0] and node not in {living.id for living in living_nodes()}:
            self._engines[number] = (self._group([self._plan.shared or self._plan.rollout], None), 0)
        return self._engines[number]

    def address(self, rank: int) -> str:
        """Of a rank's node, as Ray's nodes know it."""
        return self._addresses[self._places.ranks[rank]]

    def lines(self) -> list[str]:
        """Who is where, a line for each node; none where all are on one."""
        return in_words(self._places, self._addresses) if len(self._places.nodes) > 1 else []

    def release(self) -> None:
        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()

    async def _take(self, places: Places) -> bool:
        """Whether all of a plan could be reserved where it was arranged; otherwise nothing is."""
        ranks = () if self._plan.shared else places.ranks
        at = [*ranks, *places.engines, *itertools.chain(*places.scorers)]
        group = self._group(self._bundles(), at)
        if not await _ready(group, READY_S):
            remove_placement_group(self._groups.pop())
            return False
        seats = iter([(group, index) for index in range(len(at))])
        self.ranks = list(itertools.islice(seats, len(ranks)))
        self._engines = list(itertools.islice(seats, len(places.engines)))
        self.scorers = [list(itertools.islice(seats, each.reward.workers)) for each in self._plan.scorers]
        if self._plan.shared:
            self.ranks = list(self._engines)
        self._places = places
        return True

    async def _ask(self, does_not_fit: bool) -> None:
        """Pause. While there is no room, Ray sees what is wanted: that is what makes an autoscaler bring nodes."""
        asked = self._config.grows and does_not_fit
        if asked:
            self._group(self._bundles(), None)
        await asyncio.sleep(PAUSE_S * (1 + random.random()))
        if asked:
            remove_placement_group(self._groups.pop())

    def _bundles(self) -> list[Bundle]:
        """Of the ranks, where they have their own, of the engines, of the scoring actors."""
        plan = self._plan
        ranks = [] if plan.shared else [plan.rank] * plan.ranks
        engines = [plan.shared or plan.rollout] * plan.rollout_workers
        return [*ranks, *engines, *(each.each for each in plan.scorers for _ in range(each.reward.workers))]

    def _group(self, bundles: Sequence[Bundle], nodes: Sequence[str] | None) -> PlacementGroup:
        """A group, kept so that it is released. `nodes`: of each bundle."""
        labels = None if nodes is None else [{NODE: node} for node in nodes]
        group = placement_group([bundle.wants for bundle in bundles], strategy="PACK", bundle_label_selector=labels)
        self._groups.append(group)
        return group

    def _want(self) -> str:
        return f"the run needs {Bundle(cpus=self._plan.cpus, gpus=self._plan.gpus)}"


def living_nodes() -> list[Node]:
    """In the order in which they joined, as far as Ray tells."""
    # Ray's public interface knows what is free in the whole cluster only
    free = ray._private.state.available_resources_per_node()
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


async def _ready(group: PlacementGroup, seconds: float) -> bool:
    return await asyncio.to_thread(group.wait, seconds)


def _free(nodes: Sequence[Node]) -> str:
    kinds = [Bundle(cpus=node.free.get("CPU", 0.0), gpus=node.free.get("GPU", 0.0)) for node in nodes]
    return "; ".join(f"{bundle} on {node.address}" for bundle, node in list(zip(kinds, nodes, strict=True))[:SHOWN])
