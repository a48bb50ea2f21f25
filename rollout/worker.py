"""The rollout room's face: one worker with one live engine. A plain class; in production an async Ray actor.

worker = RolloutWorker(config.model, config.rollout, config.cluster.device, config.longest_sequence)
await worker.start()
await worker.load(parameters)                     # version 0
group = await worker.generate(prompt, sampling)   # any number at the same time
await worker.close()
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from configs.schema import ModelConfig, RolloutConfig
from rollout.engine.staging import Staging
from rollout.errors import EngineDead, ParametersRefused, RolloutError
from rollout.types import Group, Parameters, Prompt, Sampling

if TYPE_CHECKING:
    from rollout.engine.engine import Device, Engine, Transport

__all__ = ["EngineDead", "ParametersRefused", "RolloutError", "RolloutWorker"]


class RolloutWorker:
    """Answers prompts with groups of samples. After EngineDead nothing works any more: replace the worker."""

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        device: Device,
        longest_sequence: int,
        transport: Transport = "shared_memory",
        number: int = 0,
    ) -> None:
        """Starts nothing. `longest_sequence` counts the tokens of prompt and answer together; `number` is what its
        groups are marked with."""
        self._model = model
        self._rollout = rollout
        self._device = device
        self._longest_sequence = longest_sequence
        self._transport = transport
        self._number = number
        self._engine: Engine | None = None
        self._staging = Staging()
        self._loading = asyncio.Lock()
        self._version = -1

    async def start(self) -> None:
        """Start the engine with the parameters of the model folder. Raises RolloutError."""
        from rollout.engine.engine import Engine

        self._engine = await Engine.start(
            self._model, self._rollout, self._device, self._longest_sequence, self._transport
        )

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Group:
        """A group of `sampling.samples` samples, sampled together. Raises RolloutError, EngineDead."""
        engine = self._live()
        if sampling.samples > 1:
            await engine.watched(engine.share_prompt(prompt))
        samples = await engine.watched(*(engine.sample(prompt, sampling, i) for i in range(sampling.samples)))
        return Group(prompt=prompt, samples=tuple(samples), worker=self._number)

    async def logprobs(self, prompt: Prompt, answers: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        """Log-probabilities of given answers' tokens at temperature 1. Raises RolloutError, EngineDead."""
        engine = self._live()
        return await engine.watched(*(engine.logprobs(prompt, answer) for answer in answers))

    async def load(self, parameters: Parameters) -> dict[str, float]:
        """Make a published version live; returns wall seconds by phase: fetch, pause, load, resume.

        Shared memory: everything is fetched and checked before the engine pauses; ParametersRefused leaves the old
        version live. The other transports wait for the learner to send at the same time. Raises EngineDead where the
        engine is lost.
        """
        async with self._loading:
            engine = self._live()
            started = time.perf_counter()
            shared = self._transport == "shared_memory"
            path = await asyncio.to_thread(self._staging.fetch, parameters) if shared else None
            fetched = time.perf_counter() - started
            seconds = (await engine.watched(engine.update(parameters, path)))[0]
            self._version = parameters.version
            return {"fetch": fetched, **seconds}

    async def join(self, info: dict[str, Any]) -> None:
        """Connect with the learner's sender, once, while the sender connects too; shared memory needs no such thing.

        `info` is the init info of vLLM's worker-side transfer engine for the transport.
        """
        engine = self._live()
        await engine.watched(engine.join(info))

    async def receive(self, info: dict[str, Any]) -> None:
        """Transport 'ipc': one chunk from the learner's sender while `load` waits; returns when it is in the model.

        `info` is what vLLM's sender gives to its client's `update_weights`.
        """
        engine = self._live()
        await engine.watched(engine.receive(info))

    async def sent(self) -> None:
        """Transport 'ipc': every chunk was received; `load` may finish."""
        self._live().sent()

    async def version(self) -> int:
        """The live version; -1 before the first load."""
        return self._version

    def pids(self) -> list[int]:
        """Processes that belong to the engine, for tests and for finding it in a process list."""
        return self._live().pids()

    async def close(self) -> None:
        """End the engine and all its processes. Harmless when repeated or before `start`."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.close()
        self._staging.close()

    def _live(self) -> Engine:
        if self._engine is None:
            raise EngineDead("the engine is not running: start() was not called, or close() was")
        return self._engine
