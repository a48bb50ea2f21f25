"""What runs of several methods and seeds say together: pure functions of outcomes, defined in docs/comparison.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.compare.outcomes import Curve, Outcome
from configs.load import as_tree
from configs.objectives import GraoObjective
from configs.schema import Config

SHARE_OF_BEST = 0.9
TERMS = {"alpha": "exploration", "beta": "imitation", "lambda": "regulariser"}
"""GRAO's coefficients and the terms that they weigh."""

Methods = Mapping[str, Sequence[Outcome]]
"""The finished runs of each method, in the order in which the methods were given; none is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The held-out score that stands for 90% of the best."""

    start: float
    """Mean score of the start model over all runs."""
    best: float
    """Highest mean over seeds that a method had at one evaluated step."""
    method: str
    step: int
    """Where the best was."""

    @property
    def value(self) -> float:
        return self.start + SHARE_OF_BEST * (self.best - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One step of a curve over seeds."""

    step: int
    mean: float
    low: float
    """Lowest seed."""
    high: float
    """Highest seed."""


def grouped(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes by method, methods in order of appearance."""
    return {name: [one for one in outcomes if one.method == name] for name in dict.fromkeys(o.method for o in outcomes)}


def configs_of(methods: Methods) -> dict[str, Config]:
    """One config of each method; they differ in seed and folder only."""
    return {name: outcomes[0].config for name, outcomes in methods.items()}


def by_seed(outcomes: Sequence[Outcome], measure: Callable[[Outcome], float | None]) -> dict[int, float]:
    """The measure of each run that has it, by seed."""
    found = {outcome.seed: measure(outcome) for outcome in outcomes}
    return {seed: value for seed, value in found.items() if value is not None}


def paired(outcomes: Sequence[Outcome], others: Sequence[Outcome], measure: str) -> dict[int, float]:
    """Differences of a final measure by seed, for seeds that both have."""
    mine, theirs = (
        {one.seed: one.final[measure] for one in each if measure in one.final} for each in (outcomes, others)
    )
    return {seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs}


def over_curves(curves: Sequence[Curve]) -> list[Point]:
    """Several seeds' curves as one, at the steps that all of them have."""
    values = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(each) for each in values))) if values else []
    at = {step: [each[step] for each in values] for step in shared}
    return [Point(step=step, mean=sum(v) / len(v), low=min(v), high=max(v)) for step, v in at.items()]


def target_of(methods: Methods) -> Target | None:
    """None where no method was ever better than the start model."""
    starts = [outcome.heldout[0][1] for outcomes in methods.values() for outcome in outcomes]
    start = sum(starts) / len(starts)
    points = [(p, name) for name, each in methods.items() for p in over_curves([one.heldout for one in each])]
    point, method = max(points, key=lambda found: found[0].mean)
    if point.mean <= start:
        return None
    return Target(start=start, best=point.mean, method=method, step=point.step)


def steps_to(outcome: Outcome, target: Target) -> int | None:
    """The first evaluated step at which the run's score reaches the target; None where none does."""
    close = 1e-9 * max(1.0, abs(target.value))  # the target is a sum: equal on paper is reached
    return next((step for step, score in outcome.heldout if score >= target.value - close), None)


def largest_fall(curve: Curve) -> float:
    """How far a score was below the best that the run had reached before, where that is most; 0 if it never fell."""
    best, fall = -math.inf, 0.0
    for _, score in curve:
        best = max(best, score)
        fall = max(fall, best - score)
    return fall


def full_grao(configs: Mapping[str, Config]) -> str | None:
    """The GRAO with all three terms: the one that ablations were made of, else the first."""
    found = {name: len(ablations(configs, name)) for name, config in configs.items() if _is_full(config)}
    return max(found, key=lambda name: found[name]) if found else None


def ablations(configs: Mapping[str, Config], full: str) -> dict[str, str]:
    """Methods that are `full` with one coefficient at 0 and nothing else changed, by that coefficient."""
    return {
        coefficient: name
        for coefficient in TERMS
        for name, config in configs.items()
        if coefficient_of(config, coefficient) == 0 and _same_but(config, configs[full], coefficient)
    }


def sensitivity(configs: Mapping[str, Config], coefficient: str) -> dict[float, str]:
    """GRAO methods that differ in this coefficient alone, by its value: the largest such set, empty below 3 values."""
    best: dict[float, str] = {}
    for config in configs.values():
        found: dict[float, str] = {}
        for name, other in configs.items():
            value = coefficient_of(other, coefficient)
            if value is not None and _same_but(other, config, coefficient):
                found.setdefault(value, name)
        if len(found) > max(len(best), 2):
            best = dict(sorted(found.items()))
    return best


def coefficient_of(config: Config, coefficient: str) -> float | None:
    """alpha, beta or lambda of a GRAO config; None of another objective."""
    objective = config.learner.objective
    if not isinstance(objective, GraoObjective):
        return None
    return {"alpha": objective.alpha, "beta": objective.beta, "lambda": objective.lambda_}[coefficient]


def _is_full(config: Config) -> bool:
    return all(coefficient_of(config, coefficient) for coefficient in TERMS)


def _same_but(config: Config, other: Config, coefficient: str) -> bool:
    return coefficient_of(other, coefficient) is not None and _rest(config, coefficient) == _rest(other, coefficient)


def _rest(config: Config, coefficient: str) -> str:
    """Everything that makes the method, without this coefficient."""
    tree = as_tree(config)
    del tree["run"]["folder"], tree["run"]["seed"]
    tree["learner"]["objective"].pop(coefficient, None)
    return json.dumps(tree, sort_keys=True)
