"""Numbers of one step or one evaluation, computed from records. Pure; names and meanings are in docs/metrics.md.

A number that could not be measured because no row was trained is NaN here; KL is left out where it was not asked for.
Numbers about references are of the prompts that have one, and left out where none has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from learner.objectives.interface import Objective
from learner.types import RankReport, Row, RowResult
from reward.metrics import against_references
from reward.types import ScoredGroup


def rewards(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Distribution of the samples' total rewards, the references' mean, and the means of each reward."""
    answered = with_reference(groups)
    values = np.array([reward for group in groups for reward in group.rewards])
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    measured = {
        "reward/mean": float(values.mean()),
        "reward/std": float(values.std()),
        "reward/q25": low,
        "reward/q50": middle,
        "reward/q75": high,
        **({"reward/reference_mean": mean(group.reference_reward for group in answered)} if answered else {}),
    }
    for name in groups[0].breakdown:
        parts = [group.breakdown[name] for group in groups]
        measured[f"reward/{name}/mean"] = mean(value for part in parts for value in part.samples)
        if answered:
            measured[f"reward/{name}/reference_mean"] = mean(group.breakdown[name].reference for group in answered)
    return measured


def with_reference(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """The groups whose prompt has a reference answer: all, but for objectives and rewards that need none."""
    return [group for group in groups if group.group.prompt.has_reference]


def against_reference(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Shares of samples whose reward is above, equal to and below that of their reference answer."""
    if not with_reference(groups):
        return {}
    found = against_references(groups)
    return {"reference/win": found.win, "reference/tie": found.tie, "reference/loss": found.loss}


def lengths(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Tokens of prompts, samples and references; share of samples cut at the limit."""
    samples = [sample for group in groups for sample in group.group.samples]
    tokens = [len(sample.token_ids) for sample in samples]
    references = [len(group.group.prompt.reference_ids) for group in with_reference(groups)]
    return {
        "length/mean": mean(tokens),
        "length/max": float(max(tokens)),
        "length/truncated": mean(sample.finish == "length" for sample in samples),
        "length/prompt_mean": mean(len(group.group.prompt.token_ids) for group in groups),
        **({"length/reference_mean": mean(references)} if references else {}),
    }


def staleness(groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
    """Updates between a sample's first token and the version that the step starts from."""
    samples = [sample for group in groups for sample in group.group.samples]
    ages = [version - sample.first_version for sample in samples]
    return {
        "staleness/mean": mean(ages),
        "staleness/max": float(max(ages)),
        "staleness/mixed": mean(sample.last_version > sample.first_version for sample in samples),
    }


def advantages(groups: Sequence[ScoredGroup], objective: Objective) -> dict[str, float]:
    """Mean |A_i|, mean A_y (groups without signal count as 0), share of groups without signal."""
    found = [objective.advantages(group) for group in groups]
    if not found[0].samples:
        return {}  # of tokens, and known to the learner only
    return {
        "advantage/abs_mean": mean(abs(a) for one in found for a in one.samples),
        "advantage/reference_mean": mean(one.reference for one in found),
        "group/without_signal": mean(not one.has_signal for one in found),
    }


def of_samples(groups: Sequence[ScoredGroup], version: int, objective: Objective) -> dict[str, float]:
    """Everything above; nothing for groups without samples."""
    if not groups[0].group.samples:
        return {}
    return {
        **rewards(groups),
        **against_reference(groups),
        **lengths(groups),
        **staleness(groups, version),
        **advantages(groups, objective),
    }


def forward(rows: Sequence[Row], results: Mapping[int, RowResult], sampled: bool = True) -> dict[str, float]:
    """What the learner's forward pass says of the rows, before the update. sampled: whether the groups have samples.

    Rows that nothing is learnt from are not computed (of groups without signal, for most objectives), hence the names;
    without samples all are.
    """
    samples = [(row, results[index]) for index, row in enumerate(rows) if row.kind == "sample"]
    references = [results[index] for index, row in enumerate(rows) if row.kind == "reference"]
    if results and all(math.isnan(result.mean_logprob) for result in results.values()):
        return {}  # of a reward model
    if not sampled:
        return {"logprob/reference_mean": mean(result.mean_logprob for result in references)}
    tokens = sum(len(row.token_ids) for row, _ in samples)
    kl = [result.kl_sum for _, result in samples]
    asked = {} if all(map(math.isnan, kl)) else {"kl/trained_mean": _ratio(sum(kl), tokens)}
    return {
        "logprob/trained_sample_mean": mean(result.mean_logprob for _, result in samples),
        "logprob/trained_reference_mean": mean(result.mean_logprob for result in references),
        "gap/trained_mean": _ratio(sum(result.gap_sum for _, result in samples), tokens),
        "gap/trained_max": max((result.gap_max for _, result in samples), default=math.nan),
        "entropy/trained_mean": _ratio(sum(result.entropy_sum for _, result in samples), tokens),
        **asked,
    }


def critic(reports: Sequence[RankReport]) -> dict[str, float]:
    """How well the critic foretells returns, before the update; nothing without a critic."""
    found = [report.critic for report in reports if report.critic is not None]
    if not found:
        return {}
    rows = [row for one in found for row in one.rows]
    tokens = math.fsum(row.tokens for row in rows)
    error, returned = (
        math.fsum(values) / tokens for values in ((r.error_sum for r in rows), (r.return_sum for r in rows))
    )
    error_variance = math.fsum(row.error_square_sum for row in rows) / tokens - error**2
    variance = math.fsum(row.return_square_sum for row in rows) / tokens - returned**2
    return {
        "critic/loss": math.fsum(row.loss_sum for row in rows) / tokens,
        "critic/explained_variance": 1 - error_variance / variance if variance > 0 else math.nan,
        "critic/bias": error,
        "critic/return_mean": returned,
        "critic/advantage_abs_mean": math.fsum(row.advantage_size_sum for row in rows) / tokens,
        "critic/grad_norm": found[0].grad_norm,
    }


def work(groups: Sequence[ScoredGroup], reports: Sequence[RankReport]) -> dict[str, float]:
    """Tokens generated and computed, and how evenly the ranks share them."""
    unique = [report.unique_tokens for report in reports]
    nominal = sum(report.nominal_tokens for report in reports)
    return {
        "tokens/generated": float(sum(len(sample.token_ids) for group in groups for sample in group.group.samples)),
        "tokens/unique": float(sum(unique)),
        "tokens/nominal": float(nominal),
        "tokens/shared": _ratio(nominal, sum(unique)),
        "tokens/imbalance": _ratio(max(unique), mean(unique)),
        "micro_batches": float(max(report.micro_batches for report in reports)),
    }


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; NaN of nothing."""
    kept = list(values)
    return _ratio(math.fsum(kept), len(kept))


def _ratio(value: float, count: float) -> float:
    return value / count if count else math.nan
