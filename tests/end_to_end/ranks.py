"""Learner ranks as real processes without Ray, for tests."""

from __future__ import annotations

import multiprocessing
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest.mock import patch

from configs.schema import LearnerConfig, ModelConfig, RolloutConfig
from learner.worker import LearnerRank
from learner.zero.engine import ZeroEngine

T = TypeVar("T")
ANSWER_TIMEOUT_S = 300


class Ranks:
    """`world` processes with a LearnerRank each. `call` runs a function of the rank in all of them at once."""

    def __init__(
        self, model: Path, world: int, learner: LearnerConfig, rollout: RolloutConfig, trust: bool = False,
        device: Literal["cpu", "gpu"] = "cpu",
    ) -> None:  # fmt: skip
        self.world, self.secret = world, os.urandom(16).hex()
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        settings = (ModelConfig(path=str(model), trust_remote_code=trust), learner, rollout)
        for _ in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, *settings, device), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        address, port = "127.0.0.1", self._ask(0, LearnerRank.host)[1]
        self.facts = self._all(
            [(LearnerRank.start, (rank, world, rank, address, port, self.secret)) for rank in range(world)]
        )

    def call(self, function: Callable[..., T], *arguments: Any) -> list[T]:
        """The answers of all ranks, or the first one's exception."""
        return self._all([(function, arguments)] * self.world)

    def close(self) -> None:
        """Close the ranks and wait for their processes. Raises AssertionError if one does not end by itself."""
        self.call(LearnerRank.close)
        for connection, process in zip(self._connections, self._processes, strict=True):
            connection.send(None)
            process.join(30)
            assert process.exitcode == 0, f"rank's process ended with {process.exitcode}"

    def _all(self, requests: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
        with ThreadPoolExecutor(self.world) as pool:
            futures = [pool.submit(self._ask, rank, *request) for rank, request in enumerate(requests)]
            failed = [error for future in futures if (error := future.exception()) is not None]
            if failed:
                raise failed[0]
            return [future.result() for future in futures]

    def _ask(self, rank: int, function: Callable[..., Any], arguments: tuple[Any, ...] = ()) -> Any:
        self._connections[rank].send((function, arguments))
        if not self._connections[rank].poll(ANSWER_TIMEOUT_S):
            raise TimeoutError(f"rank {rank} does not answer")
        fine, answer = self._connections[rank].recv()
        if not fine:
            raise answer
        return answer


@contextmanager
def beside(
    rank: LearnerRank, model: str, learner: LearnerConfig, rollout: RolloutConfig, longest: int | None = None
) -> Iterator[Any]:
    """In the process of `rank`, which has met the others: a rank of another model. All ranks enter together."""
    other: Any = LearnerRank(ModelConfig(path=model), learner, rollout, "cpu", 3, longest)
    with patch.object(ZeroEngine, "_meet"):
        other.start(rank._rank, rank._world, rank._rank, "127.0.0.1", rank.host()[1], secrets.token_hex(16))
    yield other
    other._publisher.close()


def _serve(
    connection: Connection,
    model: ModelConfig,
    learner: LearnerConfig,
    rollout: RolloutConfig,
    device: Literal["cpu", "gpu"],
) -> None:
    rank = LearnerRank(model, learner, rollout, device, seed=3)
    while (request := connection.recv()) is not None:
        function, arguments = request
        try:
            connection.send((True, function(rank, *arguments)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test gets it
            connection.send((False, error))
