"""GRAO: scored groups to weighted rows. Pure Python.

Source: "Learning to Align, Aligning to Learn" (arXiv 2508.07750v1), Eq. 3 and 4. For a prompt q with reference y and
samples o_1..o_G, and J(x) the mean token log-probability of x given q, the objective to maximise is

    alpha * (1/G) sum_i A_i J(o_i)                    exploration (alpha is 1 in the paper)
    + beta * A_y J(y)                                 imitation
    + lambda * (1/G) sum_i A_i (J(o_i) - J(y))        alignment regulariser

Collecting the factor of each J gives a sum over G + 1 sequences whose weights follow from the rewards alone:

    c_i = (alpha + lambda) A_i / G                    of a sample
    c_y = beta A_y - (lambda/G) sum_i A_i             of the reference

Advantages (Eq. 4) are (R - mean) / std with the population std of one group. The paper's text puts the reference into
that group, its formula does not, so both readings are offered:

    samples_and_reference (default)   mean and std over all G + 1 rewards. Advantages sum to zero,
                                      so sum_i A_i = -A_y and c_y = (beta + lambda/G) A_y.
    samples                           mean and std over the G samples, applied to the reference too.
                                      sum_i A_i = 0, so c_y = beta A_y.

Where the paper is silent: std = 0 means all advantages are 0; such a group has no signal, gives no rows, and still
counts. The one global count that every weight is divided by is the number of groups of the step, those without signal
included. Samples that are all equal do carry signal (in the default reading) where the reference scores differently.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from configs.schema import ObjectiveConfig
from learner.types import Row
from reward.types import ScoredGroup

AdvantageGroup = Literal["samples_and_reference", "samples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Advantages of one group."""

    samples: tuple[float, ...]
    """[G] A_i"""
    reference: float
    """A_y"""
    has_signal: bool
    """False where the rewards that mean and std are taken over are all equal; then every advantage is 0."""


def advantages(rewards: Sequence[float], reference_reward: float, advantage_group: AdvantageGroup) -> Advantages:
    """Eq. 4 for one group: `rewards` [G] of the samples, one of the reference; all finite."""
    pool = [*rewards, reference_reward] if advantage_group == "samples_and_reference" else list(rewards)
    # Sums of rewards that are equal on paper (0.1 + 0.2 and 0.3) differ by rounding, and dividing by the std would
    # blow that noise up to full-sized advantages.
    if math.isclose(min(pool), max(pool), rel_tol=1e-9, abs_tol=1e-12):
        return Advantages(samples=(0.0,) * len(rewards), reference=0.0, has_signal=False)
    mean, std = statistics.mean(pool), statistics.pstdev(pool)
    return Advantages(
        samples=tuple((reward - mean) / std for reward in rewards),
        reference=(reference_reward - mean) / std,
        has_signal=True,
    )


def rows(groups: Sequence[ScoredGroup], objective: ObjectiveConfig) -> list[Row]:
    """The sequences of a step with their weights, group by group: samples in order, then the reference.

    A row whose weight is exactly 0 is left out: it changes neither the loss nor any term, and costs a forward pass.
    """
    found: list[Row] = []
    for index, scored in enumerate(groups):
        prompt, samples = scored.group.prompt, scored.group.samples
        advantage = advantages(scored.rewards, scored.reference_reward, objective.advantage_group)
        of_sample = (objective.alpha + objective.lambda_) / (len(samples) * len(groups))
        of_reference = sum(_reference_factors(objective, len(samples))) / len(groups)
        found += [
            Row(group=index, kind="sample", token_ids=sample.token_ids, logprobs=sample.logprobs, weight=of_sample * a)
            for sample, a in zip(samples, advantage.samples, strict=True)
        ]
        weight = of_reference * advantage.reference
        found.append(Row(group=index, kind="reference", token_ids=prompt.reference_ids, logprobs=None, weight=weight))
    return [row for row in found if row.weight != 0.0]


def terms(
    groups: Sequence[ScoredGroup], rows: Sequence[Row], mean_logprobs: Mapping[int, float], objective: ObjectiveConfig
) -> dict[str, float]:
    """Value of each term, coefficient included, averaged over the groups; their sum is minus the loss.

    `rows` as `rows()` gave them for `groups`; `mean_logprobs` is J by index into `rows`, at the loss temperature.
    The weight of a row is a sum of one share per term, so each term is that share of weight * J.
    """
    exploration = imitation = regulariser = 0.0
    samples_total = objective.alpha + objective.lambda_
    for index, row in enumerate(rows):
        value = row.weight * mean_logprobs[index]
        if row.kind == "sample":
            exploration += value * objective.alpha / samples_total
            regulariser += value * objective.lambda_ / samples_total
        else:
            imitates, regularises = _reference_factors(objective, len(groups[row.group].rewards))
            imitation += value * imitates / (imitates + regularises)
            regulariser += value * regularises / (imitates + regularises)
    return {"exploration": exploration, "imitation": imitation, "regulariser": regulariser}


def summary(groups: Sequence[ScoredGroup], objective: ObjectiveConfig) -> dict[str, float]:
    """Scalars of a step's advantages: mean |A_i|, mean A_y (groups without signal count as 0), share without signal."""
    found = [advantages(group.rewards, group.reference_reward, objective.advantage_group) for group in groups]
    return {
        "advantage_abs_mean": statistics.fmean(abs(a) for one in found for a in one.samples),
        "advantage_reference_mean": statistics.fmean(one.reference for one in found),
        "groups_without_signal": statistics.fmean(not one.has_signal for one in found),
    }


def _reference_factors(objective: ObjectiveConfig, samples: int) -> tuple[float, float]:
    """What A_y is multiplied by in c_y: the imitation's share and the regulariser's.

    Uses the exact value of sum_i A_i (-A_y or 0) instead of adding up rounded advantages.
    """
    joint = objective.advantage_group == "samples_and_reference"
    return objective.beta, objective.lambda_ / samples if joint else 0.0
