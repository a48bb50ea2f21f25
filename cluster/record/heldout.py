"""Held-out prompts: how they are answered, the numbers of each prompt, and the record of one evaluation. Pure.

`grao evaluate` and the evaluations of a training run take their numbers from here, so they say the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.record import measures
from cluster.record.estimates import Estimate, estimate
from configs.schema import Config
from learner.objectives.interface import Objective
from learner.types import RowResult
from reward.metrics import nag_by_prompt, rates
from reward.types import ScoredGroup
from rollout.types import Sampling

RewardsByPrompt = Mapping[str, Sequence[float]]
"""Of one model's answers, by prompt id."""


def heldout_sampling(config: Config) -> Sampling:
    """How held-out prompts are answered."""
    return Sampling(
        samples=config.evaluation.samples,
        temperature=config.evaluation.temperature,
        top_p=1.0,
        max_new_tokens=config.rollout.max_new_tokens,
        stop=config.rollout.stop,
        seed=config.run.seed,
    )


def by_prompt(
    groups: Sequence[ScoredGroup],
    start: RewardsByPrompt | None = None,
    log_ratios: Sequence[Sequence[float]] | None = None,
) -> dict[str, list[float]]:
    """One value per prompt for every number that has an interval; against the reference, per prompt that has one.

    start: rewards of the start model's answers (None: no NAG). log_ratios: by prompt and answer, the answer's
    log-probability less the start model's (None: no KL).
    """
    against = [
        rates(scored.rewards, [scored.reference_reward] * len(scored.rewards))
        for scored in measures.with_reference(groups)
    ]
    samples = [scored.group.samples for scored in groups]
    found = {
        "reward/mean": [measures.mean(scored.rewards) for scored in groups],
        "length/mean": [measures.mean(len(sample.token_ids) for sample in each) for each in samples],
        "length/truncated": [measures.mean(sample.finish == "length" for sample in each) for each in samples],
    }
    if against:
        found["reference/win"] = [each.win for each in against]
        found["reference/tie"] = [each.tie for each in against]
        found["reference/loss"] = [each.loss for each in against]
    if start is not None:
        gains = nag_by_prompt(groups, start)
        found["nag/net"] = [net for _, net in gains]
        found["nag/rate"] = [rate for rate, _ in gains]
    if log_ratios is not None:
        tokens = [sum(len(sample.token_ids) for sample in each) for each in samples]
        found["kl/mean"] = [math.fsum(sums) / count for sums, count in zip(log_ratios, tokens, strict=True)]
    return found


def of_objective(
    groups: Sequence[ScoredGroup], objective: Objective, results: Mapping[int, RowResult]
) -> dict[str, list[float]]:
    """The objective's value on each prompt (higher is better); every weight was divided by the number of prompts."""
    values = [0.0] * len(groups)
    for index, row in enumerate(objective.rows(groups)):
        values[row.group] += len(groups) * (results[index].gain - results[index].penalty)
    return {"objective": values}


def estimates(values: Mapping[str, Sequence[float]]) -> dict[str, Estimate]:
    """Mean and interval of every number that is finite for every prompt."""
    return {name: estimate(each) for name, each in values.items() if all(map(math.isfinite, each))}


def evaluation_record(
    step: int,
    groups: Sequence[ScoredGroup],
    start: RewardsByPrompt | None = None,
    log_ratios: Sequence[Sequence[float]] | None = None,
    judged: tuple[Objective, Mapping[int, RowResult]] | None = None,
) -> dict[str, Any]:
    """One evaluation of a training run, for evaluations.jsonl.

    judged: an objective that trains without samples, and what the learner says of these prompts under it. With it the
    groups may have no samples; then there are no rewards.
    """
    answered = bool(groups[0].group.samples)
    metrics: dict[str, float] = {}
    values: dict[str, list[float]] = {}
    if answered:
        metrics |= {**measures.rewards(groups), **measures.lengths(groups)}
        values |= by_prompt(groups, start, log_ratios)
    if judged is not None:
        objective, results = judged
        rows = objective.rows(groups)
        metrics |= {**measures.forward(rows, results, sampled=False), **objective.metrics(rows, results)}
        values |= of_objective(groups, objective, results)
    metrics |= {name: measures.mean(each) for name, each in values.items()}
    intervals = {name: [each.low, each.high] for name, each in estimates(values).items()}
    record = {"step": step, "prompts": len(groups), "metrics": metrics, "intervals": intervals}
    if answered:
        record["rewards"] = {scored.group.prompt.id: list(scored.rewards) for scored in groups}
        record["reference_rewards"] = {
            scored.group.prompt.id: scored.reference_reward for scored in measures.with_reference(groups)
        }
    return record


def start_rewards(records: Sequence[Mapping[str, Any]]) -> RewardsByPrompt | None:
    """The rewards of a run's evaluation before its first update; None where it has answered nothing there."""
    return next((record["rewards"] for record in records if record["step"] == 0 and "rewards" in record), None)
