"""Ray: connect, start actors. The only file that turns plain worker classes into actors."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.workers.actors import RemoteRank, RemoteReward, RemoteRollout, ScoringActors
from cluster.workers.gang import Gang, PlacementError, Seat
from cluster.workers.plan import Bundle, Plan, Scorers, plan, plan_without_learner
from configs.schema import Config, ModelConfig
from learner.worker import ADDRESS, KEEP_FREED_MEMORY, LearnerRank
from reward.model import RewardModelWorker
from reward.worker import RewardWorker
from rollout.worker import RolloutWorker

SCORING_RESTARTS = 3  # of one scoring actor in a run
LOCAL_OBJECT_STORE = 512 * 2**20  # groups are small; parameters never pass through Ray's object store


def this_machine() -> dict[str, float]:
    """What a Ray of our own would find here."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


class Cluster:
    """A connection to Ray with this run's reservations. Use as an async context manager."""

    def __init__(self, config: Config, learner: bool = True, say: Callable[[str], None] = print) -> None:
        """Without `learner` there are engines and rewards only, also for an objective that trains without them.

        `say` gets a line where the run waits for places.
        """
        self._config = config
        self._plan: Plan = plan(config) if learner else plan_without_learner(config)
        # without one an engine is asked for the log-probabilities of whole sequences, and then makes one token more
        self._longest_sequence = config.longest_sequence + (0 if learner else 1)
        self._gang = Gang(self._plan, config.cluster, say)
        # where a cluster's image tells Ray to leave this alone, all workers of a node would take its first GPU
        masked = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}
        self._environment = {"PYTHONPATH": os.pathsep.join(_import_path()), **masked}

    async def __aenter__(self) -> Cluster:
        self._connect()
        try:
            await self._gang.reserve()
        except BaseException:
            ray.shutdown()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._gang.release()
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

    def map(self) -> list[str]:
        """Who is where, a line for each node; none where all are on one."""
        return self._gang.lines()

    def rollout(self, number: int, model: ModelConfig) -> RemoteRollout:
        """A new rollout actor in its reserved place; not started yet."""
        config = self._config
        actor = ray.remote(RolloutWorker).options(
            **self._options(self._gang.engine(number), self._plan.rollout, threads=config.rollout.cpus_per_worker),
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
            scorers.reward.label: ScoringActors(scorers.field, tuple(self._scorer(scorers, seat) for seat in seats))
            for scorers, seats in zip(self._plan.scorers, self._gang.scorers, strict=True)
        }

    def _scorer(self, scorers: Scorers, seat: Seat) -> Any:
        options = self._options(seat, scorers.each, threads=scorers.reward.cpus_per_worker)
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
        memory = {} if self._plan.rank.gpus else KEEP_FREED_MEMORY
        actor = ray.remote(LearnerRank).options(
            **self._options(
                self._gang.ranks[number],
                self._plan.rank,
                threads=config.learner.threads,
                more={**memory, ADDRESS: self._gang.address(number)},
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

    def _options(self, seat: Seat, bundle: Bundle, threads: float, more: Mapping[str, str] = {}) -> dict[str, Any]:
        group, index = seat
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
