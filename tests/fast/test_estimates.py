"""Means with bootstrap intervals, and prompt-by-prompt gains."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.record.estimates import estimate
from reward.metrics import nag_by_prompt
from reward.types import ScoredGroup
from tests.reward_groups import group, prompt


def scored(id: str, rewards: tuple[float, ...]) -> ScoredGroup:
    answers = group(*("a" for _ in rewards), of=prompt(id=id))
    return ScoredGroup(group=answers, rewards=rewards, reference_reward=1.0, breakdown={})


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400).tolist()
    found = estimate(values)
    error = 1.96 * 2.0 / math.sqrt(400)
    assert found.value == pytest.approx(np.mean(values))
    assert found.high - found.value == pytest.approx(error, rel=0.15)
    assert found.value - found.low == pytest.approx(error, rel=0.15)


def test_the_interval_holds_the_truth_about_95_times_in_100() -> None:
    numbers = np.random.default_rng(2)
    found = [estimate(numbers.normal(size=50).tolist(), seed=k) for k in range(300)]
    assert 0.90 <= np.mean([one.low <= 0 <= one.high for one in found]) <= 0.98


def test_equal_values_have_no_width_and_the_same_seed_the_same_interval() -> None:
    assert (estimate([0.5] * 9).low, estimate([0.5] * 9).high) == (0.5, 0.5)
    assert estimate([0.0, 1.0, 5.0], seed=3) == estimate([0.0, 1.0, 5.0], seed=3)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite values"):
        estimate(values)


def test_gains_are_counted_by_prompt_and_place() -> None:
    after, before = (
        [scored("a", (1.0, 0.0)), scored("b", (2.0, 2.0))],
        {"b": (2.0, 1.0), "a": (0.0, 0.5)},
    )
    assert nag_by_prompt(after, before) == [(0.5, 0.0), (0.5, 0.5)]
    with pytest.raises(ValueError, match="different prompts"):
        nag_by_prompt(after, {"a": (0.0, 0.5)})
