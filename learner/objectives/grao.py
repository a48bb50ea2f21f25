"""GRAO: explore, imitate, and keep the two in balance. Pure Python.

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

Not in the paper and off by default: off-policy samples are clipped or capped (learner/objectives/ratio.py), advantages
are cut to [-a, a] before weights are formed, weights below 0 are scaled, beta moves over the run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from configs.objectives import GraoObjective
from learner.objectives.interface import Advantages, Weigh
from learner.objectives.ratio import ratio_of
from learner.types import Row, RowResult
from reward.types import ScoredGroup

AdvantageGroup = Literal["samples_and_reference", "samples"]


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


class Grao:
    def __init__(self, config: GraoObjective) -> None:
        self._config = config
        linear = config.clip is None and config.importance_cap is None
        self.weigh: Weigh | None = None if linear else ratio_of(config)

    def advantages(self, scored: ScoredGroup) -> Advantages:
        found = advantages(scored.rewards, scored.reference_reward, self._config.advantage_group)
        clip = self._config.advantage_clip
        if clip is None:
            return found
        samples = tuple(max(-clip, min(clip, each)) for each in found.samples)
        return replace(found, samples=samples, reference=max(-clip, min(clip, found.reference)))

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        """Samples in order, then the reference.

        A row whose weight is exactly 0 is left out: it changes neither the loss nor any term, and costs a forward pass.
        """
        found: list[Row] = []
        for index, scored in enumerate(groups):
            prompt, samples = scored.group.prompt, scored.group.samples
            advantage = self.advantages(scored)
            of_sample = (self._config.alpha + self._config.lambda_) / (len(samples) * len(groups))
            found += [
                Row(
                    group=index,
                    kind="sample",
                    token_ids=sample.token_ids,
                    logprobs=sample.logprobs,
                    weight=self._limited(of_sample * a),
                )
                for sample, a in zip(samples, advantage.samples, strict=True)
            ]
            weight = self._limited(sum(self._reference_parts(advantage)) / len(groups))
            found.append(
                Row(group=index, kind="reference", token_ids=prompt.reference_ids, logprobs=None, weight=weight)
            )
        return [row for row in found if row.weight != 0.0]

    def terms(
        self, groups: Sequence[ScoredGroup], rows: Sequence[Row], results: Mapping[int, RowResult]
    ) -> dict[str, float]:
        """The three terms. A row's weight is a sum of one share per term, so each term is that share of its gain."""
        exploration = imitation = regulariser = 0.0
        samples_total = self._config.alpha + self._config.lambda_
        for index, row in enumerate(rows):
            gain = results[index].gain
            if row.kind == "sample":
                exploration += gain * self._config.alpha / samples_total
                regulariser += gain * self._config.lambda_ / samples_total
            else:
                imitates, regularises = self._reference_parts(self.advantages(groups[row.group]))
                imitation += gain * imitates / (imitates + regularises)
                regulariser += gain * regularises / (imitates + regularises)
        return {"exploration": exploration, "imitation": imitation, "regulariser": regulariser}

    def metrics(self, rows: Sequence[Row], results: Mapping[int, RowResult]) -> dict[str, float]:
        tokens = sum(len(row.token_ids) for row in rows if row.kind == "sample")
        clipped = math.fsum(result.clipped for result in results.values())
        return {"ratio/clipped": clipped / tokens if tokens else math.nan} if self.weigh else {}

    def _limited(self, weight: float) -> float:
        return weight if weight >= 0 else weight * self._config.negative_scale

    def _reference_parts(self, advantage: Advantages) -> tuple[float, float]:
        """The imitation's share of c_y and the regulariser's.

        Where advantages are not clipped sum_i A_i is known (-A_y or 0): adding up would round.
        """
        joint = self._config.advantage_group == "samples_and_reference"
        known = -advantage.reference if joint else 0.0
        total = known if self._config.advantage_clip is None else math.fsum(advantage.samples)
        return self._config.beta * advantage.reference, -self._config.lambda_ / len(advantage.samples) * total
