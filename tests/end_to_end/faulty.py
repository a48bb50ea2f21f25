"""Learner ranks and rollout workers that get parameters or temperatures wrong while a file says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from learner.worker import LearnerRank
from rollout.types import Group, Parameters, Prompt, Sampling
from rollout.worker import RolloutWorker

VARIABLE = "GRAO_TEST_FAULT"
"""Names the file, to the processes that Ray starts too."""
NOTHING = "nothing is delivered"
LEFT_OUT = "one tensor is left out"
SWAPPED = "two tensors are swapped"
OLD = "one engine stays at the old version"
OLD_ONCE = "one engine stays at the old version, until it is loaded again"
TEMPERATURE = "one engine samples at another temperature"
ONE = 1
"""The engine that is meant."""
LAYERS = ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight")
"""The second is left out; both are swapped."""


def fault() -> str:
    return Path(os.environ[VARIABLE]).read_text()


class Rank(LearnerRank):
    def start(self, *arguments: Any) -> Any:
        facts = super().start(*arguments)
        assert self._publisher is not None
        names = [share.name for share in self._engine.model.shares()]
        places = [names.index(layer) for layer in LAYERS]
        self._publisher.publish = partial(wrong, self._publisher.publish, places, [])  # type: ignore[method-assign]
        return facts


def wrong(
    publish: Callable[..., Parameters],
    places: Sequence[int],
    last: list[torch.Tensor],
    version: int,
    tensors: Sequence[torch.Tensor],
) -> Parameters:
    """What `publish` would, but for the fault."""
    one, other = places
    right = [tensor.clone() for tensor in tensors]
    given = list(right)
    if fault() == NOTHING:
        given = list(last)
    elif fault() == LEFT_OUT:
        given[other] = last[other]
    elif fault() == SWAPPED:
        given[one], given[other] = right[other], right[one]
    last[:] = given
    return publish(version, given)


class Worker(RolloutWorker):
    missed = -1

    async def load(self, parameters: Parameters) -> dict[str, float]:
        old = fault() == OLD or (fault() == OLD_ONCE and self.missed != parameters.version)
        if self._number != ONE or not old:
            return await super().load(parameters)
        self.missed = self._version = parameters.version
        await self._live()._llm.update_weight_version(str(parameters.version))
        return dict.fromkeys(("fetch", "pause", "load", "resume"), 0.0)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Group:
        if self._number == ONE and fault() == TEMPERATURE:
            sampling = replace(sampling, temperature=sampling.temperature / 0.8)
        return await super().generate(prompt, sampling)
