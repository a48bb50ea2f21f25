"""Places on a Ray of several nodes with invented GPUs: everything at once, ranks on whole nodes, who waits for whom."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes
from ray.util.placement_group import placement_group_table

from cluster.workers import gang, placement
from cluster.workers.gang import Gang, PlacementError
from cluster.workers.plan import PlanError, plan
from configs.load import load, parse
from configs.schema import Config
from learner.worker import LearnerRank
from tests.end_to_end.harness import ROOT
from tests.fast.test_configs import SMALL

NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
GPU = ("cluster.device=gpu", "learner.transport=nccl")


class Seen(LearnerRank):
    """A rank that says what it sees of its node."""

    def sees(self) -> tuple[str | None, str, str]:
        return os.environ.get("CUDA_VISIBLE_DEVICES"), self.host()[0], ray.get_runtime_context().get_node_id()


@pytest.fixture(scope="module")
def head() -> Iterator[Nodes]:
    """A head without GPUs, on a cluster whose image tells Ray to leave CUDA_VISIBLE_DEVICES alone."""
    with patch.dict(os.environ, {NOSET: "1"}):
        made = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def nodes(head: Nodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """The same head for every test, to which each adds nodes of its own."""
    monkeypatch.setattr(gang, "READY_S", 3.0)
    monkeypatch.setattr(gang, "PAUSE_S", 0.5)
    ray.init(address=head.address, log_to_driver=False, logging_level=logging.ERROR)
    yield head
    ray.shutdown()
    for node in list(head.worker_nodes):
        head.remove_node(node)


def gpus(nodes: Nodes, *counts: int) -> list[Any]:
    made = [nodes.add_node(num_cpus=32, num_gpus=count) for count in counts]
    nodes.wait_for_nodes()
    return made


def config(*overrides: str) -> Config:
    return parse(SMALL, [*GPU, *overrides])


def gang_of(settings: Config, said: list[str]) -> Gang:
    return Gang(plan(settings), settings.cluster, said.append)


def node_of(seat: gang.Seat) -> str:
    group, index = seat
    return str(placement_group_table(group)["bundles_to_node_id"][index])


async def test_ranks_have_whole_nodes_and_engines_the_others(nodes: Nodes) -> None:
    gpus(nodes, 8, 8)
    settings = load(ROOT / "configs" / "qwen2.5_7b_2node.yaml")
    made = gang_of(settings, [])
    await made.reserve()
    engines = {node_of(made.engine(number)) for number in range(8)}
    ranks = {node_of(seat) for seat in made.ranks}
    assert len(engines) == len(ranks) == 1
    assert engines != ranks
    assert [line.split(": ")[1] for line in made.lines()] == ["ranks 0 to 7", "engines 0 to 7"]
    made.release()


async def test_the_later_of_two_runs_waits_for_the_first(nodes: Nodes) -> None:
    gpus(nodes, 2, 2)
    settings = config("rollout.workers=2", "learner.ranks=2")
    said: list[str] = []
    runs = [gang_of(settings, said) for _ in range(2)]
    tasks = {asyncio.create_task(run.reserve()): run for run in runs}
    done, waiting = await asyncio.wait(tasks, timeout=15, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.sleep(5)
    assert len(done) == len(waiting) == 1
    assert not next(iter(waiting)).done()
    assert any("waiting for free places: the run needs 4 CPUs, 4 GPUs" in line for line in said)
    tasks[done.pop()].release()
    [last] = waiting
    await asyncio.wait_for(last, 30)
    tasks[last].release()


async def test_who_waits_too_long_is_told_what_is_free(nodes: Nodes) -> None:
    gpus(nodes, 2)
    first, second = (gang_of(config("cluster.wait_s=1"), []) for _ in range(2))
    await first.reserve()
    with pytest.raises(PlacementError, match=r"cluster\.wait_s: the run needs 2 CPUs, 2 GPUs, and within 1 s"):
        await second.reserve()
    first.release()


async def test_a_cluster_that_grows_is_waited_for_and_another_is_not(nodes: Nodes) -> None:
    gpus(nodes, 1)
    with pytest.raises(PlanError, match="the run needs 3 GPUs"):
        await gang_of(config("learner.ranks=2"), []).reserve()
    made = gang_of(config("learner.ranks=2", "cluster.grows=true"), [])
    reserving = asyncio.create_task(made.reserve())
    await asyncio.sleep(3)
    assert not reserving.done()
    gpus(nodes, 2)
    await asyncio.wait_for(reserving, 30)
    assert node_of(made.ranks[0]) == node_of(made.ranks[1]) != node_of(made.engine(0))
    made.release()


async def test_an_engine_whose_node_is_lost_gets_a_place_elsewhere(nodes: Nodes) -> None:
    lost, _ = gpus(nodes, 1, 2)
    made = gang_of(config("rollout.workers=1", "learner.ranks=2"), [])
    await made.reserve()
    before = node_of(made.engine(0))
    assert before == lost.node_id
    nodes.remove_node(lost)
    gpus(nodes, 1)
    group, index = made.engine(0)
    assert await asyncio.to_thread(group.wait, 30)
    assert node_of((group, index)) != before
    made.release()


async def test_every_worker_has_its_own_gpu_and_its_nodes_address(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(nodes, 1, 2)
    ray.shutdown()
    monkeypatch.setattr(placement, "LearnerRank", Seen)
    settings = config("learner.ranks=2", f"cluster.address={nodes.address}")
    async with placement.Cluster(settings) as cluster:
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        seen = await asyncio.gather(*(cluster.rank(number).actor.sees.remote() for number in range(2)))
        assert sorted(str(devices) for devices, _, _ in seen) == ["0", "1"]
        for _, address, node in seen:
            assert address == addresses[node]
