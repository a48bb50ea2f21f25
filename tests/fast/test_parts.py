"""What a run does with workers that refuse a version, or answer nothing: engines and reward workers of the test."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from cluster.run.parts import Rewards, Rollouts, RunError
from cluster.workers.fleet import FleetError
from configs.load import parse
from configs.schema import Config
from rollout.worker import ParametersRefused
from tests.fast.virtual_time import run

CUT = "version 3, rank 0: fetching from '10.0.0.2:4711' failed: the connection ended early"


class Worker:
    """Refuses its first `refusals` loads, as rollout/engine/staging.py does; or stays silent, as a stopped process."""

    def __init__(self, number: int, refusals: int = 0, silent: bool = False) -> None:
        self.number, self.refusals, self.silent = number, refusals, silent
        self.tries = 0
        self.ended = False

    async def start(self) -> None: ...

    async def load(self, parameters: object) -> dict[str, float]:
        return {"load": float(await self._answer())}

    async def score(self, group: object) -> int:
        return await self._answer()

    async def counts(self) -> dict[str, int]:
        return {"tries": await self._answer()}

    async def _answer(self) -> int:
        self.tries += 1
        if self.silent:
            await asyncio.Event().wait()
        if self.tries <= self.refusals:
            raise RayTaskError("load", "", ParametersRefused(CUT))
        return self.tries

    async def close(self) -> None: ...

    def end(self) -> None:
        self.ended = True


class Workers:
    """Hands out the given workers, in their order."""

    def __init__(self, *workers: Worker) -> None:
        self.waiting, self.made = list(workers), list[Worker]()

    def rollout(self, number: int, model: object) -> Worker:
        self.made.append(self.waiting.pop(0))
        return self.made[-1]

    def reward(self, number: int, scoring: object) -> Worker:
        return self.rollout(number, scoring)

    def scoring(self) -> dict[str, object]:
        return {}


def config(transport: str = "shared_memory", **rollout: float) -> Config:
    tree = {
        "cluster": {"device": "cpu" if transport == "shared_memory" else "gpu"},
        "learner": {"transport": transport},
        "model": {"path": "m"},
        "data": {"train": "x"},
        "run": {"folder": "r"},
        "rollout": rollout,
        "reward": {"rewards": [{"kind": "numeric"}], "group_timeout_s": 90},
    }
    return parse(tree)


async def loaded(workers: Workers, count: int, settings: Config) -> dict[str, float]:
    rollouts = Rollouts(workers, settings, count)  # type: ignore[arg-type]
    await rollouts.fleet.start()
    return await rollouts.load(object())  # type: ignore[arg-type]


def test_a_version_that_one_cut_connection_kept_away_is_fetched_again() -> None:
    workers = Workers(Worker(0, refusals=1), Worker(1))
    assert run(loaded(workers, 2, config())) == {"load": 2.0}
    assert [worker.tries for worker in workers.made] == [2, 1]
    assert not any(worker.ended for worker in workers.made)


def test_a_version_that_is_refused_again_and_again_is_an_error() -> None:
    workers = Workers(Worker(0, refusals=99))
    with pytest.raises(RayTaskError) as caught:
        run(loaded(workers, 1, config()))
    assert str(caught.value.cause) == CUT
    assert workers.made[0].tries == 3


def test_an_engine_that_takes_no_parameters_in_time_is_replaced_and_the_new_one_loaded() -> None:
    workers = Workers(Worker(0, silent=True), Worker(1), Worker(0))
    assert run(loaded(workers, 2, config(load_timeout_s=7))) == {"load": 2.0}  # once when it came up, once as asked
    assert [(worker.number, worker.ended) for worker in workers.made] == [(0, True), (1, False), (0, False)]


def test_a_transport_that_takes_no_new_engine_ends_the_run_before_one_is_started() -> None:
    """Which takes minutes on a GPU."""
    workers = Workers(Worker(0, silent=True), Worker(0))
    with pytest.raises(RunError, match="transport 'nccl' cannot take a new one into its group"):
        run(loaded(workers, 1, config("nccl", load_timeout_s=7)))
    assert len(workers.made) == 1


def test_engines_that_never_take_parameters_end_the_run() -> None:
    workers = Workers(*(Worker(0, silent=True) for _ in range(4)))
    with pytest.raises(FleetError, match=r"rollout workers keep dying, .* within rollout.load_timeout_s \(7 s\)"):
        run(loaded(workers, 1, config(load_timeout_s=7)))
    assert all(worker.ended for worker in workers.made)


def test_a_silent_reward_worker_is_replaced() -> None:
    async def ask(workers: Workers, name: str) -> Any:
        settings = config().reward
        rewards = Rewards(workers, 1, settings)  # type: ignore[arg-type]
        await rewards.fleet.start()
        return await (rewards.score(object()) if name == "score" else rewards.counts())  # type: ignore[arg-type]

    workers = Workers(Worker(0, silent=True), Worker(0))
    assert run(ask(workers, "score")) == 1
    workers = Workers(Worker(0, silent=True), Worker(0))
    assert run(ask(workers, "counts")) == {"reward_calls/tries": 1.0}
    workers = Workers(*(Worker(0, silent=True) for _ in range(4)))
    with pytest.raises(FleetError, match=r"within reward.group_timeout_s \(90 s\)"):
        run(ask(workers, "score"))
