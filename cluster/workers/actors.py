"""Living actors with typed methods, so that nobody else handles Ray's untyped handles. Started in placement.py."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError

from learner.types import LearnerFacts, RankReport, RowResult
from reward.types import ScoredGroup, ScoreRequest
from reward.worker import RewardError
from rollout.types import Group, Parameters, Prompt, Sampling
from rollout.worker import EngineDead

CLOSE_TIMEOUT_S = 20.0

DEATHS = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError)

Answer = TypeVar("Answer")


def is_death(error: BaseException) -> bool:
    """Whether an error of a call means that the worker has to be replaced."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, EngineDead)
    return isinstance(error, DEATHS)


def death_in_words(error: BaseException) -> str:
    """One line on how a worker ended."""
    if isinstance(error, OutOfMemoryError):
        first = " ".join(str(error).split("\n", 1)[0].split())
        return f"its node ran out of memory, and Ray ended workers there ({first[:300]})"
    return " ".join(str(error).split())[:300]


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

    async def start(self, rank: int, world: int, local_rank: int, address: str, port: int, secret: str) -> LearnerFacts:
        return await self.actor.start.remote(rank, world, local_rank, address, port, secret)

    async def join(self, client: Any, address: str, port: int, world: int) -> None:
        await self.actor.join.remote(client, address, port, world)

    async def train_step(self, step: int, groups: Any) -> RankReport:
        """`groups` is a reference made by `share`: Ray sends the groups once to a node, not once to a rank."""
        return await self.actor.train_step.remote(step, groups)

    async def measure(self, groups: Any) -> tuple[RowResult, ...]:
        return await self.actor.measure.remote(groups)

    async def log_ratios(self, groups: Any) -> tuple[tuple[int, float], ...]:
        return await self.actor.log_ratios.remote(groups)

    async def logprobs(self, sequences: Sequence[tuple[int, ...]]) -> tuple[tuple[int, tuple[float, ...]], ...]:
        return await self.actor.logprobs.remote(tuple(sequences))

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
        except DEATHS as error:
            said = death_in_words(error)
            raise RewardError(f"scoring actors of {self.field} keep dying, the last one of: {said}") from error


def share(groups: Sequence[ScoredGroup]) -> Any:
    """A reference to groups in Ray's object store, for calls that send the same groups to several actors."""
    return ray.put(tuple(groups))


async def _close(actor: Any) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await actor.close.remote()
    except (RayError, TimeoutError) as error:
        logging.getLogger(__name__).debug("a worker did not close by itself and is ended: %s", error)
    ray.kill(actor)
