"""Ray: connect, reserve, start actors. The only file that turns plain worker classes into actors.

Each wrapper below is one living actor with typed methods, so that nobody else handles Ray's untyped handles.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.plan import Bundle, Plan, Scorers, check, plan, plan_without_learner
from configs.schema import Config, ModelConfig
from learner.types import RankReport, RowResult
from learner.worker import LearnerRank
from reward.model import RewardModelWorker
from reward.types import ScoredGroup, ScoreRequest
from reward.worker import RewardError, RewardWorker
from rollout.types import Group, Parameters, Prompt, Sampling
from rollout.worker import EngineDead, RolloutWorker

CLOSE_TIMEOUT_S = 20.0
SCORING_RESTARTS = 3  # of one scoring actor in a run
LOCAL_OBJECT_STORE = 512 * 2**20  # groups are small; parameters never pass through Ray's object store


Answer = TypeVar("Answer")


class PlacementError(RuntimeError):
    """Ray cannot be reached or cannot hold the run. One line that names the field and the fix."""


def is_death(error: BaseException) -> bool:
    """Whether an error of a call means that the worker has to be replaced."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, EngineDead)
    return isinstance(error, RayActorError)


def cause_of(error: BaseException) -> BaseException:
    """The error that a worker raised, without Ray's wrapping of remote stack traces."""
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error


@dataclass(frozen=True, slots=True)
class RemoteRollout:
    """One rollout actor."""

    actor: Any
    seat: int
    """Its number in the fleet; a replacement gets the same."""

    async def start(self) -> None:
        await self.actor.start.remote()

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Group:
        return await self.actor.generate.remote(prompt, sampling)

    async def logprobs(self, prompt: Prompt, answers: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        return await self.actor.logprobs.remote(prompt, tuple(answers))

    async def join(self, info: dict[str, Any]) -> None:
        await self.actor.join.remote(info)

    async def load(self, parameters: Parameters) -> dict[str, float]:
        return await self.actor.load.remote(parameters)

    async def close(self) -> None:
        await _close(self.actor)

    def end(self) -> None:
        ray.kill(self.actor)


@dataclass(frozen=True, slots=True)
class RemoteReward:
    """One reward actor."""

    actor: Any

    async def start(self) -> None:
        await self.actor.start.remote()

    async def score(self, group: Group) -> ScoredGroup:
        return await self.actor.score.remote(group)

    async def counts(self) -> dict[str, int]:
        return await self.actor.counts.remote()

    async def close(self) -> None:
        await _close(self.actor)

    def end(self) -> None:
        ray.kill(self.actor)


@dataclass(frozen=True, slots=True)
class RemoteRank:
    """One learner actor."""

    actor: Any

    async def host(self) -> tuple[str, int]:
        return await self.actor.host.remote()

    async def start(
        self, rank: int, world: int, local_rank: int, address: str, port: int, secret: str
    ) -> dict[str, int]:
        return await self.actor.start.remote(rank, world, local_rank, address, port, secret)

    async def join(self, client: Any, address: str, port: int, world: int) -> None:
        await self.actor.join.remote(client, address, port, world)

    async def train_step(self, step: int, groups: Any) -> RankReport:
        """`groups` is a reference made by `share`: Ray sends the groups once to a node, not once to a rank."""
        return await self.actor.train_step.remote(step, groups)

    async def measure(self, groups: Any) -> tuple[RowResult, ...]:
        return await self.actor.measure.remote(groups)

    async def publish(self, version: int) -> Parameters:
        return await self.actor.publish.remote(version)

    async def send(self, parameters: Parameters) -> None:
        await self.actor.send.remote(parameters)

    async def save(self, folder: str) -> None:
        await self.actor.save.remote(folder)

    async def load(self, folder: str) -> None:
        await self.actor.load.remote(folder)

    async def export(self, folder: str) -> None:
        await self.actor.export.remote(folder)

    async def close(self) -> None:
        await _close(self.actor)

    def end(self) -> None:
        ray.kill(self.actor)


@dataclass(frozen=True, slots=True)
class RelayToEngines:
    """What learner rank 0 sees of engines on the same GPUs: it hands them its memory, chunk after chunk.

    Has the methods of vLLM's weight sync client. The driver opens the update in every engine and commits it.
    """

    actors: tuple[Any, ...]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        ray.get([actor.join.remote(init_info) for actor in self.actors])

    def start_weight_update(self) -> None:
        """The driver has called load."""

    def update_weights(self, update_info: Any) -> None:
        ray.get([actor.receive.remote(update_info) for actor in self.actors])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        ray.get([actor.sent.remote() for actor in self.actors])


@dataclass(frozen=True, slots=True)
class ScoringActors:
    """What reward workers see of the actors that hold one reward's model; all workers share them.

    Ray itself restarts one that dies and makes its calls again: its only state is the model, which it loads when it is
    called, and a fleet in the driver could not hand a replacement to calls that reward workers have under way.
    """

    field: str
    actors: tuple[Any, ...]

    async def start(self) -> None:
        await asyncio.gather(*(self._of(actor.start.remote()) for actor in self.actors))

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """All requests of a prompt go to the same actor, which has kept the scores of equal ones."""
        actor = self.actors[hash(requests[0].prompt_ids) % len(self.actors)]
        return await self._of(actor.score.remote(tuple(requests)))

    async def _of(self, answer: Awaitable[Answer]) -> Answer:
        try:
            return await answer
        except RayTaskError as error:
            raise cause_of(error) from error
        except RayActorError as error:
            said = " ".join(str(error).split())[:300]
            raise RewardError(f"scoring actors of {self.field} keep dying, the last one of: {said}") from error


def share(groups: Sequence[ScoredGroup]) -> Any:
    """A reference to groups in Ray's object store, for calls that send the same groups to several actors."""
    return ray.put(tuple(groups))


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
            **self._options(group, index, self._plan.rank, threads=config.learner.cpus_per_rank)
        )
        return RemoteRank(
            actor.remote(config.model, config.learner, config.rollout, config.cluster.device, config.run.seed)
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

    def _options(self, group: PlacementGroup, index: int, bundle: Bundle, threads: float) -> dict[str, Any]:
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
                }
            },
        }


def _import_path() -> list[str]:
    """Where workers on this node find our packages and the user's reward functions."""
    return [path for path in dict.fromkeys([os.getcwd(), *sys.path]) if path and os.path.isdir(path)]


async def _close(actor: Any) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await actor.close.remote()
    except (RayError, TimeoutError) as error:
        logging.getLogger(__name__).debug("a worker did not close by itself and is ended: %s", error)
    ray.kill(actor)
