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

Where the paper is silent: rewards that are equal up to rounding (learner/objectives/signal.py) have no std, and all
advantages are 0; such a group has no signal, gives no rows, and still counts. The one global count that every weight is
divided by is the number of groups of the step, those without signal included. Samples that are all equal do carry
signal (in the default reading) where the reference scores differently.

No group owns a step. A standardised value among n is at most sqrt(n - 1) in size, so in the default reading all
advantages lie within sqrt(G). In the other one the reference is measured by a mean and a std that it has no part in,
and (R_y - mean) / std has no bound: it is held within sqrt(G) too, which leaves the paper's formula alone wherever the
other reading could give as much. With sum |A_i| <= sqrt(G sum A_i^2) the sizes of a group's weights then add up to at
most, B groups in the step,

    samples_and_reference    [ (alpha + lambda) sqrt((G + 1)/G) + (beta + lambda/G) sqrt(G) ] / B
    samples                  [ (alpha + lambda) + beta sqrt(G) ] / B

Not in the paper: off-policy samples are corrected, and clipped where asked for (learner/objectives/ratio.py); off by
default: advantages are cut to [-a, a] before weights are formed, weights below 0 are scaled, beta moves over the run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from configs.objectives import GraoObjective
from learner.objectives.interface import Advantages, Weigh
from learner.objectives.ratio import ratio_metrics, ratio_of
from learner.objectives.signal import FLOOR, has_signal
from learner.types import Row, RowResult
from reward.types import ScoredGroup

AdvantageGroup = Literal["samples_and_reference", "samples"]


def advantages(
    rewards: Sequence[float], reference_reward: float, advantage_group: AdvantageGroup, signal_floor: float = FLOOR
) -> Advantages:
    """Eq. 4 for one group: `rewards` [G] of the samples, one of the reference; all finite."""
    pool = [*rewards, reference_reward] if advantage_group == "samples_and_reference" else list(rewards)
    if not has_signal(pool, [reference_reward], signal_floor):
        return Advantages(samples=(0.0,) * len(rewards), reference=0.0, has_signal=False)
    mean, std = statistics.mean(pool), statistics.pstdev(pool)
    bound = math.sqrt(len(rewards))
    return Advantages(
        samples=tuple((reward - mean) / std for reward in rewards),
        reference=max(-bound, min(bound, (reference_reward - mean) / std)),
        has_signal=True,
    )


class Grao:
    def __init__(self, config: GraoObjective, off_policy: bool = False) -> None:
        self._config = config
        corrects = config.correction.applies(off_policy)
        self.weigh: Weigh | None = ratio_of(config, off_policy) if corrects or config.clip is not None else None

    def advantages(self, scored: ScoredGroup) -> Advantages:
        group, floor = self._config.advantage_group, self._config.signal_floor
        found = advantages(scored.rewards, scored.reference_reward, group, floor)
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
        return ratio_metrics(self.weigh, rows, results)

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
