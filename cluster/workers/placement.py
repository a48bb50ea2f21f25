"""Ray: connect, reserve, start actors. The only file that turns plain worker classes into actors."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.workers.actors import RemoteRank, RemoteReward, RemoteRollout, ScoringActors
from cluster.workers.plan import Bundle, Plan, Scorers, check, plan, plan_without_learner
from configs.schema import Config, ModelConfig
from learner.worker import KEEP_FREED_MEMORY, LearnerRank
from reward.model import RewardModelWorker
from reward.worker import RewardWorker
from rollout.worker import RolloutWorker

SCORING_RESTARTS = 3  # of one scoring actor in a run
LOCAL_OBJECT_STORE = 512 * 2**20  # groups are small; parameters never pass through Ray's object store


class PlacementError(RuntimeError):
    """Ray cannot be reached or cannot hold the run. One line that names the field and the fix."""


def this_machine() -> dict[str, float]:
    """What a Ray of our own would find here."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


class Cluster:
    """A connection to Ray with this run's reservations. Use as an async context manager."""

    def __init__(self, config: Config, learner: bool = True) -> None:
        """Without `learner` there are engines and rewards only, also for an objective that trains without them."""
        self._config = config
        self._plan: Plan = plan(config) if learner else plan_without_learner(config)
        # without one an engine is asked for the log-probabilities of whole sequences, and then makes one token more
        self._longest_sequence = config.longest_sequence + (0 if learner else 1)
        self._groups: list[PlacementGroup] = []
        self._rollout_slots: list[tuple[PlacementGroup, int]] = []
        self._rank_slots: list[tuple[PlacementGroup, int]] = []
        self._scorer_slots: list[list[PlacementGroup]] = []
        self._environment = {"PYTHONPATH": os.pathsep.join(_import_path())}

    async def __aenter__(self) -> Cluster:
        self._connect()
        try:
            check(self._plan, [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]])
            await self._reserve()
        except BaseException:
            ray.shutdown()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for group in self._groups:
            remove_placement_group(group)
        # a local Ray ends with this; on a running cluster only this job's actors do
        ray.shutdown()

    @property
    def nodes(self) -> int:
        """Living nodes."""
        return len([node for node in ray.nodes() if node["Alive"]])

    def describe(self) -> str:
        """One line about what the run reserved."""
        nodes = self.nodes
        return f"{nodes} node{'s' if nodes > 1 else ''}, {self._plan.cpus:g} CPUs, {self._plan.gpus:g} GPUs reserved"

    def rollout(self, number: int, model: ModelConfig) -> RemoteRollout:
        """A new rollout actor in its reserved place; not started yet."""
        config = self._config
        group, index = self._rollout_slots[number]
        actor = ray.remote(RolloutWorker).options(
            **self._options(group, index, self._plan.rollout, threads=config.rollout.cpus_per_worker),
            max_concurrency=max(1000, 4 * config.rollout.max_concurrent),
        )
        return RemoteRollout(
            actor.remote(
                model,
                config.rollout,
                config.cluster.device,
                self._longest_sequence,
                config.learner.transport,
                number,
            ),
            seat=number,
        )

    def scoring(self) -> dict[str, ScoringActors]:
        """New actors for every reward that is a model, by the reward's label. They end with the cluster."""
        return {
            scorers.reward.label: ScoringActors(scorers.field, tuple(self._scorer(scorers, group) for group in groups))
            for scorers, groups in zip(self._plan.scorers, self._scorer_slots, strict=True)
        }

    def _scorer(self, scorers: Scorers, group: PlacementGroup) -> Any:
        options = self._options(group, 0, scorers.each, threads=scorers.reward.cpus_per_worker)
        restarted = {"max_restarts": SCORING_RESTARTS, "max_task_retries": -1, "max_concurrency": 1000}
        device = "cuda" if scorers.each.gpus else "cpu"
        actor = ray.remote(RewardModelWorker).options(**{**options, **restarted})
        return actor.remote(scorers.reward, scorers.field, self._config.model, device)

    def reward(self, number: int, scoring: Mapping[str, ScoringActors]) -> RemoteReward:
        """A new reward actor; not started yet."""
        actor = ray.remote(RewardWorker).options(
            num_cpus=self._plan.reward.cpus,
            num_gpus=self._plan.reward.gpus,
            scheduling_strategy="SPREAD",
            max_concurrency=1000,
            runtime_env={"env_vars": {**self._environment, "OMP_NUM_THREADS": "1"}},
        )
        assert self._config.reward is not None, "a config without rewards has no reward workers"
        return RemoteReward(actor.remote(self._config.reward, dict(scoring)))

    def rank(self, number: int) -> RemoteRank:
        """A new learner actor in its reserved place; not started yet."""
        config = self._config
        group, index = self._rank_slots[number]
        actor = ray.remote(LearnerRank).options(
            **self._options(
                group,
                index,
                self._plan.rank,
                threads=config.learner.threads,
                more={} if self._plan.rank.gpus else KEEP_FREED_MEMORY,
            )
        )
        return RemoteRank(
            actor.remote(
                config.model,
                config.learner,
                config.rollout,
                config.cluster.device,
                config.run.seed,
                self._longest_sequence,
            )
        )

    def _connect(self) -> None:
        address = self._config.cluster.address or os.environ.get("RAY_ADDRESS")
        try:
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=LOCAL_OBJECT_STORE,
                )
        except (ConnectionError, RayError, RuntimeError, ValueError, TimeoutError) as error:
            where = f"cluster.address '{address}'" if address else "a local Ray"
            raise PlacementError(f"cannot connect to {where}: {' '.join(str(error).split())[:300]}") from error

    async def _reserve(self) -> None:
        """Reserve a place for every engine and every rank, so that a replaced worker finds its place free."""
        config, plan = self._config, self._plan
        strategy = config.cluster.placement.upper()
        if config.cluster.colocate and plan.rollout_workers and plan.ranks:
            self._reserve_shared(strategy)
        else:
            for _ in range(plan.rollout_workers):
                group = self._group([plan.rollout], strategy)
                self._rollout_slots.append((group, 0))
            if plan.ranks:
                ranks = self._group([plan.rank] * plan.ranks, strategy)
                self._rank_slots = [(ranks, number) for number in range(plan.ranks)]
        for scorers in plan.scorers:
            self._scorer_slots.append([self._group([scorers.each], strategy) for _ in range(scorers.reward.workers)])
        try:
            async with asyncio.timeout(config.rollout.start_timeout_s):
                await asyncio.gather(*(group.ready() for group in self._groups))
        except TimeoutError as error:
            raise PlacementError(
                f"the cluster has enough in all, but others hold it: {self._plan.cpus:g} CPUs and"
                f" {self._plan.gpus:g} GPUs were not free within rollout.start_timeout_s"
                f" ({config.rollout.start_timeout_s:g} s)"
            ) from error

    def _reserve_shared(self, strategy: str) -> None:
        """Engine i and the ranks on its GPUs share one bundle."""
        size = self._config.rollout.tensor_parallel
        together = Bundle(
            cpus=self._plan.rollout.cpus + size * self._plan.rank.cpus,
            gpus=self._plan.rollout.gpus + size * self._plan.rank.gpus,
        )
        for _ in range(self._plan.rollout_workers):
            group = self._group([together], strategy)
            self._rollout_slots.append((group, 0))
            self._rank_slots += [(group, 0)] * size

    def _group(self, bundles: Sequence[Bundle], strategy: str) -> PlacementGroup:
        wants = [
            {name: amount for name, amount in (("CPU", bundle.cpus), ("GPU", bundle.gpus)) if amount}
            for bundle in bundles
        ]
        group = placement_group(wants, strategy=strategy)
        self._groups.append(group)
        return group

    def _options(
        self, group: PlacementGroup, index: int, bundle: Bundle, threads: float, more: Mapping[str, str] = {}
    ) -> dict[str, Any]:
        return {
            "num_cpus": bundle.cpus,
            "num_gpus": bundle.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            "max_restarts": 0,  # the fleet and the learner group replace workers: they know what to load first
            "runtime_env": {
                "env_vars": {
                    **self._environment,
                    "OMP_NUM_THREADS": str(max(1, int(threads))),
                    "TOKENIZERS_PARALLELISM": "false",
                    "VLLM_LOGGING_LEVEL": "ERROR",
                    "VLLM_NO_USAGE_STATS": "1",
                    **more,
                }
            },
        }


def _import_path() -> list[str]:
    """Where workers on this node find our packages and the user's reward functions."""
    return [path for path in dict.fromkeys([os.getcwd(), *sys.path]) if path and os.path.isdir(path)]
