"""All learner ranks as one: started together, called together, failing together."""

from __future__ import annotations

import asyncio
import collections
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from cluster.workers.actors import RemoteRank, cause_of, death_in_words, is_death, share
from learner.types import RankReport, RowResult
from reward.types import ScoredGroup
from rollout.types import Parameters

Answer = TypeVar("Answer")


class LearnerGroup:
    """K ranks of one ZeRO-3 learner. A collective hangs when one rank is missing, so any failure fails the call."""

    def __init__(self, spawn: Callable[[int], RemoteRank], ranks: int, secret: str, step_timeout_s: float) -> None:
        self._ranks = [spawn(number) for number in range(ranks)]
        self._secret = secret
        self._timeout = step_timeout_s
        self.parameters = 0
        self.updates = 0
        """Steps since the start that changed the parameters; one without any signal does not."""
        self.note: str | None = None
        """What the user should know of the model, in one line."""

    async def start(self, one_node: bool) -> None:
        """Rendezvous at rank 0 and load the model. Raises the first rank's error.

        On one node everything stays on loopback, the servers for parameters too.
        """
        hosts = await self._all([rank.host() for rank in self._ranks])
        address, port = hosts[0]
        if not one_node and len({host for host, _ in hosts}) > 1 and address.startswith("127."):
            raise LearnerGroupError(
                f"rank 0's node calls itself {address}, where ranks of other nodes would find themselves; start its Ray"
                " with --node-ip-address"
            )
        address = "127.0.0.1" if one_node else address
        seen: collections.Counter[str] = collections.Counter()
        starts = []
        for number, (rank, (host, _)) in enumerate(zip(self._ranks, hosts, strict=True)):
            starts.append(rank.start(number, len(self._ranks), seen[host], address, port, self._secret))
            seen[host] += 1
        facts = await self._all(starts)
        self.parameters, self.note = facts[0].parameters, facts[0].note

    async def meeting(self) -> tuple[str, int]:
        """An address and a free port on rank 0's node."""
        return await self._ranks[0].host()

    async def join(self, client: Any, address: str, port: int, world: int) -> None:
        """Connect with the engines where the transport needs it; see cluster/workers/transport.py."""
        await self._all([rank.join(client, address, port, world) for rank in self._ranks])

    async def train_step(self, step: int, groups: Sequence[ScoredGroup]) -> list[RankReport]:
        """One update on all ranks. `step` counts from 1."""
        shared = share(groups)
        reports = await self._all([rank.train_step(step, shared) for rank in self._ranks])
        self.updates += any(report.rows for report in reports)
        return reports

    async def measure(self, groups: Sequence[ScoredGroup]) -> dict[int, RowResult]:
        """What the objective says of groups that are not trained on, by row."""
        shared = share(groups)
        parts = await self._all([rank.measure(shared) for rank in self._ranks])
        return {result.row: result for part in parts for result in part}

    async def log_ratios(self, groups: Sequence[ScoredGroup]) -> list[list[float]]:
        """By group, of each sample: its log-probability less the start model's. Needs learner.keeps_start_model."""
        shared = share(groups)
        parts = await self._all([rank.log_ratios(shared) for rank in self._ranks])
        found = [value for _, value in sorted(pair for part in parts for pair in part)]
        ends = itertools.accumulate(len(scored.group.samples) for scored in groups)
        return [found[end - len(scored.group.samples) : end] for scored, end in zip(groups, ends, strict=True)]

    async def logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        """[T - 1] of each sequence: log-probability at temperature 1 of every token but the first."""
        parts = await self._all([rank.logprobs(sequences) for rank in self._ranks])
        return [found for _, found in sorted(one for part in parts for one in part)]

    async def publish(self, version: int) -> Parameters:
        """Stage the parameters as `version`; the answer says where their pieces lie."""
        return merge(await self._all([rank.publish(version) for rank in self._ranks]))

    async def send(self, parameters: Parameters) -> None:
        """Take part in the transfer where the transport needs the sender; shared memory does not."""
        await self._all([rank.send(parameters) for rank in self._ranks])

    async def save(self, folder: str) -> None:
        await self._all([rank.save(folder) for rank in self._ranks])

    async def load(self, folder: str) -> None:
        await self._all([rank.load(folder) for rank in self._ranks])

    async def export(self, folder: str) -> None:
        await self._all([rank.export(folder) for rank in self._ranks])

    async def close(self) -> None:
        await asyncio.gather(*(rank.close() for rank in self._ranks))

    async def _all(self, calls: Sequence[Awaitable[Answer]]) -> list[Answer]:
        """All answers, or the first failure at once: the other ranks may wait for the failed one for ever."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            async with asyncio.timeout(self._timeout):
                return list(await asyncio.gather(*tasks))
        except TimeoutError as error:
            raise LearnerGroupError(
                f"a learner call took more than learner.step_timeout_s ({self._timeout:g} s); raise it, or see why in"
                " the workers' logs"
            ) from error
        except Exception as error:
            if is_death(error):
                raise LearnerGroupError(
                    f"a learner rank died: {death_in_words(error)}. 'grao resume FOLDER' goes on from the run's last"
                    " checkpoint; for memory, lower learner.tokens_per_micro_batch or give the ranks more nodes"
                ) from error
            cause = cause_of(error)
            if cause is error:
                raise
            raise cause from error
        finally:
            for task in tasks:
                task.cancel()


class LearnerGroupError(RuntimeError):
    """The ranks did not answer together. One line that names the field and the fix."""


def merge(parts: Sequence[Parameters]) -> Parameters:
    """One notice from the notices of all ranks, which differ only in their pieces."""
    pieces = tuple(sorted((piece for part in parts for piece in part.pieces), key=lambda piece: piece.rank))
    return replace(parts[0], pieces=pieces)
