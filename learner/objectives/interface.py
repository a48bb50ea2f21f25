"""What an objective offers. Pure: numpy and records, no torch.

An objective turns the scored groups of a step into rows with weights. Where its value is linear in the
log-probabilities that is all, and loss and gradients come from one pass over the loss head. Else `weigh` gets each
micro-batch's log-probabilities and answers with the derivative of the objective by each of them; the head then forms
the gradients in a second pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from learner.types import MicroBatch, Row, RowResult
from reward.types import ScoredGroup

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Advantages of one group."""

    samples: tuple[float, ...]
    """[G] A_i; empty for an objective without samples."""
    reference: float
    """A_y; 0 for an objective that does not compare the reference."""
    has_signal: bool
    """False where the rewards that mean and std are taken over are equal up to rounding; every advantage is then 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """What the correction of a micro-batch's sample tokens amounts to, all f64[R] sums over each row's tokens."""

    capped: Floats
    """Tokens whose weight reached its bound."""
    masked: Floats
    """Tokens that were left out."""
    weight: Floats
    """Of the weights; 0 for a reference."""
    weight_square: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """A micro-batch of M targets and R rows under an objective that is not linear."""

    weights: Floats
    """f64[M] derivative of the objective (to be maximised) by each target's log-probability."""
    gain: Floats
    """f64[R] what each row adds to the objective, penalty left out."""
    penalty: Floats
    """f64[R] what each row's KL penalty takes away."""
    clipped: Floats
    """f64[R] tokens of each row whose ratio was clipped."""
    corrected: Corrected | None = None
    """None where nothing is corrected."""


class Weigh(Protocol):
    """The step of an objective that needs log-probabilities before it knows its weights."""

    def __call__(self, batch: MicroBatch, logprobs: Floats, start: Floats, proximal: Floats | None = None) -> Weighed:
        """f64[M] log-probabilities at the loss temperature: of the policy, of the start model (NaN without one), and of
        the policy before the step's first update (None in that update)."""


class Objective(Protocol):
    """One training method."""

    @property
    def weigh(self) -> Weigh | None:
        """None for an objective that is linear in the log-probabilities."""

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        """The sequences of a step with their weights, group by group. Made alike on every rank."""

    def advantages(self, scored: ScoredGroup) -> Advantages:
        """Of one group, as `rows` used them."""

    def terms(
        self, groups: Sequence[ScoredGroup], rows: Sequence[Row], results: Mapping[int, RowResult]
    ) -> dict[str, float]:
        """Value of each term, coefficient included; their sum is minus the loss. `results` by index into `rows`."""

    def metrics(self, rows: Sequence[Row], results: Mapping[int, RowResult]) -> dict[str, float]:
        """Scalars of this objective beyond those of every run; see docs/metrics.md."""


def per_row(batch: MicroBatch, values: Floats) -> Floats:
    """f64[R] sums over each row's tokens."""
    return np.bincount(batch.row_of, weights=values, minlength=len(batch.rows)).astype(np.float64)
