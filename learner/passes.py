"""What one rank computes in a step: forward and backward passes between the plan and the optimizer.

A step is prepared once, with the parameters before its first update; then come `updates_per_step` passes over the same
micro-batches, each followed by an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from learner.objectives.interface import Floats, Objective, Weighed
from learner.objectives.ppo import Estimates, Ppo
from learner.results import Values, row_results, score_results
from learner.types import CriticRow, MicroBatch, RowResult
from reward.types import ScoredGroup

if TYPE_CHECKING:
    import torch

    from learner.model.head import HeadOutput
    from learner.zero.engine import ZeroEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of a policy's forward pass, in the order of PolicyModel.forward."""

    loss_temperature: float
    rollout_temperature: float
    head_chunk: int

    @property
    def arguments(self) -> tuple[float, float, int]:
        return self.loss_temperature, self.rollout_temperature, self.head_chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A step's micro-batches on this rank, and what the passes need beside the current parameters."""

    batches: tuple[MicroBatch, ...]
    """As planned."""
    for_policy: tuple[MicroBatch, ...]
    """The same with the weights that the policy is trained with: the critic's advantages are in them."""
    start: tuple[Values | None, ...]
    """By micro-batch, the start model's; None where nobody asks."""
    estimates: tuple[Estimates, ...]
    """By micro-batch; none without a critic."""


class PolicyPasses:
    """Of every objective that trains a policy."""

    def __init__(self, engine: ZeroEngine, objective: Objective, settings: Settings) -> None:
        self._engine, self._objective, self._settings = engine, objective, settings
        self._proximal: dict[int, Floats] = {}
        """By micro-batch, the policy's log-probabilities before the step's first update, as that update met them."""

    def prepare(self, batches: Sequence[MicroBatch], groups: Sequence[ScoredGroup], with_start: bool) -> Prepared:
        """with_start: whether the start model is asked."""
        self._proximal = {}
        planned, start = tuple(batches), self.start(batches, with_start)
        if self._engine.critic is None:
            return Prepared(batches=planned, for_policy=planned, start=start, estimates=())
        assert isinstance(self._objective, Ppo), "only PPO has a critic"
        rewards = self._objective.rewards(groups)
        values = [_floats(output.values) for output in self._engine.critic.values(batches)]
        estimates = [
            self._objective.estimates(batch, rewards, of_critic, None if begin is None else begin.logprobs)
            for batch, of_critic, begin in zip(batches, values, start, strict=True)
        ]
        made_of = [part for one in estimates for part in (one.values, one.returns)]
        advantages = self._objective.normalised([one.advantages for one in estimates], self._engine.total, made_of)
        weighted = tuple(
            replace(batch, weights=(batch.weights * of_token).astype(np.float32))
            for batch, of_token in zip(batches, advantages, strict=True)
        )
        return Prepared(batches=planned, for_policy=weighted, start=start, estimates=tuple(estimates))

    def start(self, batches: Sequence[MicroBatch], asked: bool) -> tuple[Values | None, ...]:
        """By micro-batch, what the start model says."""
        if not asked:
            return (None,) * len(batches)
        assert self._engine.start_model is not None, "no start model was kept"
        outputs = self._engine.start_model.values(batches, *self._settings.arguments)
        return tuple(_values(output) for output in outputs)

    def forward_backward(self, prepared: Prepared) -> list[RowResult]:
        """The policy's results under the current parameters; its gradients stay in the engine."""
        batches = prepared.for_policy
        weighed: list[Weighed | None] = [None] * len(batches)

        def weigh(number: int, logprobs: torch.Tensor) -> torch.Tensor:
            batch, begin, now = batches[number], prepared.start[number], _floats(logprobs.cpu())
            before = self._proximal.setdefault(number, now)  # the first update's own pass: no other is made for it
            weighed[number] = made = self._weighed(batch, now, begin, before)
            assert made is not None
            return logprobs.new_tensor(made.weights)

        by_logprobs = None if self._objective.weigh is None else weigh
        outputs = self._engine.model.forward_backward(batches, by_logprobs, *self._settings.arguments)
        results: list[RowResult] = []
        for batch, output, begin, how in zip(batches, outputs, prepared.start, weighed, strict=True):
            results += row_results(batch, _values(output), begin, how)
        return results

    def critic_forward_backward(self, prepared: Prepared) -> list[CriticRow]:
        """The critic's results under its current parameters, none without one; its gradients stay in the engine."""
        critic, objective = self._engine.critic, self._objective
        if critic is None or not isinstance(objective, Ppo):
            return []

        def weigh(number: int, values: torch.Tensor) -> torch.Tensor:
            made = objective.weigh_values(prepared.batches[number], _floats(values.cpu()), prepared.estimates[number])
            return values.new_tensor(made)

        outputs = critic.forward_backward(prepared.batches, weigh)
        rows: list[CriticRow] = []
        for batch, output, of in zip(prepared.batches, outputs, prepared.estimates, strict=True):
            rows += objective.critic_rows(batch, _floats(output.values), of)
        return rows

    def measure(self, batches: Sequence[MicroBatch], start: Sequence[Values | None]) -> list[RowResult]:
        """Results under the current parameters, without gradients; `start` is what `start` gave for the batches."""
        results: list[RowResult] = []
        outputs = self._engine.model.values(batches, *self._settings.arguments)
        for batch, output, begin in zip(batches, outputs, start, strict=True):
            values = _values(output)
            results += row_results(batch, values, begin, self._weighed(batch, values.logprobs, begin))
        return results

    def values(self, batches: Sequence[MicroBatch]) -> list[RowResult]:
        """Results beside the start model's, whatever the objective makes of them; without gradients."""
        results: list[RowResult] = []
        outputs = self._engine.model.values(batches, *self._settings.arguments)
        for batch, output, begin in zip(batches, outputs, self.start(batches, asked=True), strict=True):
            results += row_results(batch, _values(output), begin, None)
        return results

    def _weighed(
        self, batch: MicroBatch, logprobs: Floats, start: Values | None, before: Floats | None = None
    ) -> Weighed | None:
        """None for a linear objective."""
        if self._objective.weigh is None:
            return None
        begin = np.full_like(logprobs, np.nan) if start is None else start.logprobs
        return self._objective.weigh(batch, logprobs, begin, before)


class ScorePasses:
    """Of the objective that trains a reward model."""

    def __init__(self, engine: ZeroEngine, objective: Objective) -> None:
        self._engine, self._objective = engine, objective

    def prepare(self, batches: Sequence[MicroBatch], groups: Sequence[ScoredGroup], with_start: bool) -> Prepared:
        planned = tuple(batches)
        return Prepared(batches=planned, for_policy=planned, start=(None,) * len(planned), estimates=())

    def forward_backward(self, prepared: Prepared) -> list[RowResult]:
        def weigh(number: int, values: torch.Tensor) -> torch.Tensor:
            return values.new_tensor(self._weighed(prepared.batches[number], _floats(values.cpu())).weights)

        outputs = self._engine.model.forward_backward(prepared.batches, weigh)
        return self._results(prepared.batches, [_floats(output.values) for output in outputs])

    def critic_forward_backward(self, prepared: Prepared) -> list[CriticRow]:
        """There is no critic."""
        return []

    def start(self, batches: Sequence[MicroBatch], asked: bool) -> tuple[Values | None, ...]:
        """There is no start model."""
        return (None,) * len(batches)

    def measure(self, batches: Sequence[MicroBatch], start: Sequence[Values | None]) -> list[RowResult]:
        return self._results(batches, [_floats(output.values) for output in self._engine.model.values(batches)])

    def _results(self, batches: Sequence[MicroBatch], values: Sequence[Floats]) -> list[RowResult]:
        results: list[RowResult] = []
        for batch, scores in zip(batches, values, strict=True):
            results += score_results(batch, scores, self._weighed(batch, scores))
        return results

    def _weighed(self, batch: MicroBatch, values: Floats) -> Weighed:
        assert self._objective.weigh is not None
        return self._objective.weigh(batch, values, np.full_like(values, np.nan))


def _floats(tensor: torch.Tensor) -> Floats:
    return tensor.double().numpy()


def _values(output: HeadOutput) -> Values:
    return Values(_floats(output.logprobs), _floats(output.rollout_logprobs), _floats(output.entropy))
