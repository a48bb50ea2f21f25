"""The objective by itself: advantages, weights, terms. The whole loss is in test_loss_reference.py."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.objectives import GraoObjective, GrpoObjective
from configs.schema import LearnerConfig
from learner.objectives import grao
from learner.objectives.build import objective_at
from learner.objectives.grao import Grao
from learner.objectives.grpo import Grpo
from learner.objectives.interface import Advantages
from tests.learner_cases import group, random_group, row_result

READINGS = ("samples_and_reference", "samples")
rewards = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9)


def test_advantages_by_hand() -> None:
    joint = grao.advantages([1.0, 0.0, 0.0], 1.0, "samples_and_reference")
    assert joint.samples == pytest.approx((1, -1, -1))
    assert joint.reference == pytest.approx(1)
    alone = grao.advantages([1.0, 0.0, 0.0], 1.0, "samples")
    assert alone.samples == pytest.approx((2**0.5, -(0.5**0.5), -(0.5**0.5)))
    assert alone.reference == pytest.approx(2**0.5)
    assert joint.has_signal
    assert alone.has_signal


@given(rewards, st.floats(-1e6, 1e6))
def test_advantages_have_mean_0_and_population_std_1(values: list[float], reference: float) -> None:
    found = grao.advantages(values, reference, "samples_and_reference")
    everything = [*found.samples, found.reference]
    if found.has_signal:
        assert statistics.fmean(everything) == pytest.approx(0, abs=1e-6)
        assert statistics.pstdev(everything) == pytest.approx(1, abs=1e-6)
    else:
        pool = [*values, reference]
        assert max(pool) - min(pool) <= max(1e-6 * max(map(abs, pool)), 1e-15)
        assert set(everything) == {0.0}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("equal", [0.0, 0.1, -3e8])
def test_equal_rewards_have_no_signal(reading: Any, equal: float) -> None:
    found = grao.advantages([equal] * 3, equal, reading)
    assert found == grao.Advantages(samples=(0.0,) * 3, reference=0.0, has_signal=False)


def ulps(value: float, *steps: int) -> list[float]:
    """float32 numbers so many of its steps from a value."""
    return [float(np.float32(value) + step * np.spacing(np.float32(value))) for step in steps]


ROUNDING = {
    "a sum in another order": [0.1 + 0.2, 0.3, 0.3],
    "equal scores in float32, last bits moved": ulps(1.2345678, 0, 1, 0, -1, 0, 2, 0, 0),
    "the same, negative": ulps(-0.7, 0, 1, -1, 0),
    "the same, huge": ulps(3e9, 0, 1, -1, 0),
    "the same, tiny": ulps(1e-12, 0, 1, -1, 0),
    "1e-9 apart": [0.5, 0.5, 0.5, 0.5 + 1e-9],
    "1 apart at 1e9": [1e9, 1e9 + 1, 1e9, 1e9],
    "what a sum of terms leaves of a 0": [0.1 + 0.2 - 0.3, 0.0, 0.0, 0.0],
}
SIGNAL = {
    "1e-5 of the size": [0.5, 0.5, 0.5, 0.5 + 1e-5],
    "small numbers": [1e-6, 2e-6],
    "all of them tiny": [1e-12, 2e-12, 3e-12],
    "huge, and apart by 1e-5": [1e9, 1e9 + 1e4, 1e9],
    "around 0": [-1e-7, 1e-7, 0.0],
    "one is 0": [0.0, 0.0, 1e-3],
}


def grpo(values: Sequence[float], reference: float, **settings: Any) -> Advantages:
    scored = group([5], [[6]] * len(values), [9], values, reference)
    return Grpo(GrpoObjective(name="grpo", **settings)).advantages(scored)


@pytest.mark.parametrize("values", ROUNDING.values(), ids=list(ROUNDING))
def test_rounding_is_no_signal(values: list[float]) -> None:
    none = Advantages(samples=(0.0,) * len(values), reference=0.0, has_signal=False)
    assert grao.advantages(values, values[0], "samples_and_reference") == none
    for far in (values[0], values[0] + max(1.0, abs(values[0]))):  # a reference beside equal samples
        assert grao.advantages(values, far, "samples") == none
        for normalises in (True, False):
            assert grpo(values, far, normalise_std=normalises) == none
    scored = group([5], [[6]] * len(values), [9], values, values[0])
    assert not Grao(GraoObjective()).rows([scored, scored])


@pytest.mark.parametrize("values", SIGNAL.values(), ids=list(SIGNAL))
def test_what_is_more_than_rounding_is_signal_at_any_scale(values: list[float]) -> None:
    for made in (
        grao.advantages(values, values[0], "samples_and_reference"),
        grao.advantages(values, values[0], "samples"),
        grpo(values, values[0]),
    ):
        assert made.has_signal
        assert 0.9 < max(map(abs, made.samples)) <= len(values) ** 0.5 * (1 + 1e-9)
    scaled = grao.advantages([1e3 * value for value in values], 1e3 * values[0], "samples_and_reference")
    assert scaled.samples == pytest.approx(grao.advantages(values, values[0], "samples_and_reference").samples)


def test_a_reference_beside_rounding_tells_the_size_of_rewards() -> None:
    """Scores in float32 that cancel leave 1e-8; that their size was 1 the reference's score shows."""
    left = [1.2e-8, 0.0, 0.0, 0.0]
    assert not grao.advantages(left, 1.0, "samples").has_signal
    assert not grpo(left, 1.0).has_signal
    equal = grao.advantages(left, 1.0, "samples_and_reference")
    assert equal.reference == pytest.approx(2, abs=1e-6)
    assert grpo(left, math.nan).has_signal  # a reference that nobody scored tells nothing


def test_the_floor_is_a_setting() -> None:
    values = [0.5, 0.5, 0.5, 0.5 + 1e-5]
    scored = group([5], [[6], [7], [8], [9]], [9], values, 0.5)
    assert not Grao(GraoObjective(signal_floor=1e-4)).advantages(scored).has_signal
    assert Grao(GraoObjective(signal_floor=0)).advantages(scored).has_signal
    assert not grpo(values, 0.5, signal_floor=1e-4).has_signal


def test_equal_samples_against_a_better_reference() -> None:
    found = grao.advantages([0.0] * 4, 1.0, "samples_and_reference")
    assert found.reference == pytest.approx(2)  # sqrt(G)
    assert found.samples == pytest.approx((-0.5,) * 4)
    assert not grao.advantages([0.0] * 4, 1.0, "samples").has_signal


def test_without_a_share_in_mean_and_std_the_reference_keeps_the_other_readings_bound() -> None:
    """Eq. 4 as printed where it is harmless, sqrt(G) where it has no bound."""
    near = grao.advantages([1.0, 0.0, 0.0, 0.0], 1.0, "samples")
    assert near.reference == pytest.approx(0.75 / statistics.pstdev([1.0, 0.0, 0.0, 0.0]))
    for spread in (1e-5, 1e-2):
        samples = [0.5, 0.5, 0.5, 0.5 + spread]
        assert grao.advantages(samples, 1.5, "samples").reference == 2
        assert grao.advantages(samples, -1.5, "samples").reference == -2


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=9),
    st.floats(-1e6, 1e6),
    st.sampled_from([1e-12, 1e-6, 1.0, 1e9]),
    st.sampled_from([0.0, 0.5]),
)
def test_no_group_owns_a_step(values: list[float], reference: float, scale: float, around: float) -> None:
    """The bounds at the top of learner/objectives/grao.py, and those of ordinary groups beside it."""
    odd = [scale * (around + 1e-5 * value) for value in values]
    count = len(odd)
    groups = [group([5], [[6]] * count, [7], odd, reference)]
    groups += [group([5], [[6]] * count, [7], [k % 2 for k in range(count)], 1.0) for _ in range(7)]
    for reading in READINGS:
        config = GraoObjective(alpha=0.9, beta=0.5, lambda_=0.6, advantage_group=reading)
        rows = Grao(config).rows(groups)
        sizes = [math.fsum(abs(row.weight) for row in rows if row.group == index) for index in range(8)]
        root = math.sqrt(count)
        joint = reading == "samples_and_reference"
        bound = 1.5 * math.sqrt((count + 1) / count) + (0.5 + 0.6 / count) * root if joint else 1.5 + 0.5 * root
        assert max(sizes) <= bound / 8 * (1 + 1e-9)
        assert sizes[0] <= 0.5 * math.fsum(sizes)
    grpo_rows = Grpo(GrpoObjective(name="grpo", kl=0)).rows(groups)
    assert math.fsum(abs(row.weight) for row in grpo_rows if row.group == 0) <= 1 / 8 * (1 + 1e-9)


def test_weights_by_hand() -> None:
    """G = 3, joint reading: c_i = (1 + 0.6) A_i / 3, c_y = 0.5 A_y - 0.6/3 * sum A_i, halved for two groups."""
    dead = group([5], [[6], [6], [6]], [7], [1.0, 1.0, 1.0], 1.0)
    alive = group([5], [[6], [7], [8]], [9, 2], [1.0, 0.0, 0.0], 1.0)
    rows = Grao(GraoObjective(beta=0.5, lambda_=0.6)).rows([dead, alive])
    assert [row.weight for row in rows] == pytest.approx([1.6 / 6, -1.6 / 6, -1.6 / 6, (0.5 + 0.2) / 2])
    assert [row.group for row in rows] == [1, 1, 1, 1]
    assert [row.kind for row in rows] == ["sample"] * 3 + ["reference"]
    assert rows[0].logprobs == (-0.5,)
    assert rows[3].logprobs is None
    assert rows[3].token_ids == (9, 2)


@pytest.mark.parametrize("reading", READINGS)
def test_weights_are_the_formula(reading: Any) -> None:
    """c_i and c_y as the docstring derives them, with sum_i A_i added up."""
    draw = random.Random(0)
    for _ in range(50):
        scored = random_group(draw, samples=5)
        objective = GraoObjective(alpha=0.7, beta=0.5, lambda_=0.6, advantage_group=reading)
        a = grao.advantages(scored.rewards, scored.reference_reward, reading)
        wanted = [1.3 * value / 5 for value in a.samples] + [0.5 * a.reference - 0.6 / 5 * sum(a.samples)]
        found = [row.weight for row in Grao(objective).rows([scored])]
        assert found == pytest.approx([weight for weight in wanted if abs(weight) > 1e-12])


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(
    ("coefficients", "kinds"),
    [((0, 0.5, 0), {"reference"}), ((1, 0, 0), {"sample"}), ((0, 0, 1), {"sample", "reference"})],
)
def test_rows_that_weigh_nothing_are_left_out(reading: Any, coefficients: tuple[float, ...], kinds: set[str]) -> None:
    alpha, beta, lambda_ = coefficients
    scored = group([5], [[6], [7]], [8], [1.0, 0.0], 1.0)
    rows = Grao(GraoObjective(alpha=alpha, beta=beta, lambda_=lambda_, advantage_group=reading)).rows([scored])
    # the regulariser's J(y) has the factor sum_i A_i, which is 0 in this reading
    assert {row.kind for row in rows} == (kinds - {"reference"} if reading == "samples" and lambda_ else kinds)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("coefficients", [(1, 0.5, 0.6), (0, 0.5, 0), (1, 0, 0), (0, 0, 1), (0, 1, 2), (0.3, 2, 1.7)])
def test_terms_are_the_papers(reading: Any, coefficients: tuple[float, ...]) -> None:
    """Each term computed from Eq. 3 as it stands, over three groups of which one is dead."""
    alpha, beta, lambda_ = coefficients
    objective = GraoObjective(alpha=alpha, beta=beta, lambda_=lambda_, advantage_group=reading)
    draw = random.Random(1)
    groups = [random_group(draw), random_group(draw), group([5], [[6]] * 4, [7], [1.0] * 4, 1.0)]
    j = {ids: -draw.random() for one in groups for ids in _answers(one)}
    wanted = dict.fromkeys(("exploration", "imitation", "regulariser"), 0.0)
    for scored in groups:
        a = grao.advantages(scored.rewards, scored.reference_reward, reading)
        *samples, reference = (j[ids] for ids in _answers(scored))
        pairs = list(zip(a.samples, samples, strict=True))
        wanted["exploration"] += alpha * statistics.fmean(a_i * j_i for a_i, j_i in pairs) / 3
        wanted["imitation"] += beta * a.reference * reference / 3
        wanted["regulariser"] += lambda_ * statistics.fmean(a_i * (j_i - reference) for a_i, j_i in pairs) / 3
    rows = Grao(objective).rows(groups)
    gains = {index: row_result(index, row.weight * j[row.token_ids]) for index, row in enumerate(rows)}
    found = Grao(objective).terms(groups, rows, gains)
    assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_terms_with_clipped_advantages_are_the_papers_with_those(reading: Any) -> None:
    objective = GraoObjective(advantage_group=reading, advantage_clip=0.8)
    draw = random.Random(2)
    groups = [random_group(draw, samples=6), random_group(draw, samples=6)]
    j = {ids: -draw.random() for one in groups for ids in _answers(one)}
    wanted = dict.fromkeys(("exploration", "imitation", "regulariser"), 0.0)
    for scored in groups:
        a = grao.advantages(scored.rewards, scored.reference_reward, reading)
        cut = [min(0.8, max(-0.8, each)) for each in (*a.samples, a.reference)]
        assert cut != [*a.samples, a.reference]
        *samples, reference = (j[ids] for ids in _answers(scored))
        pairs = list(zip(cut, samples, strict=False))
        wanted["exploration"] += statistics.fmean(a_i * j_i for a_i, j_i in pairs) / 2
        wanted["imitation"] += 0.5 * cut[-1] * reference / 2
        wanted["regulariser"] += 0.6 * statistics.fmean(a_i * (j_i - reference) for a_i, j_i in pairs) / 2
    rows = Grao(objective).rows(groups)
    gains = {index: row_result(index, row.weight * j[row.token_ids]) for index, row in enumerate(rows)}
    assert Grao(objective).terms(groups, rows, gains) == pytest.approx(wanted, abs=1e-12)


def test_without_negative_weights_nothing_is_made_less_likely() -> None:
    scored = group([5], [[6], [7]], [8], [1.0, 0.0], 0.0)
    rows = Grao(GraoObjective(negative_scale=0.0)).rows([scored])
    assert [row.token_ids for row in rows] == [(6,)]
    scaled, plain = (Grao(GraoObjective(negative_scale=scale)).rows([scored]) for scale in (0.25, 1.0))
    assert [row.weight for row in scaled] == pytest.approx(
        [plain[0].weight, plain[1].weight / 4, plain[2].weight / 4], abs=0
    )


def test_beta_moves_from_the_first_update_to_the_last() -> None:
    def weight(step: int, steps: int, objective: GraoObjective) -> float:
        learner = LearnerConfig(objective=objective, steps=steps, warmup_steps=0)
        (row,) = objective_at(step, learner).rows([group([5], [[6], [7]], [8], [0.0, 0.0], 1.0)])[2:]
        return row.weight

    moving = GraoObjective(beta=0.5, beta_end=0.1, lambda_=0.0)
    for step, beta in ((1, 0.5), (3, 0.3), (5, 0.1), (9, 0.1)):
        assert weight(step, 5, moving) == pytest.approx(weight(1, 5, GraoObjective(beta=beta, lambda_=0.0)))
    assert weight(1, 1, moving) == pytest.approx(weight(1, 1, GraoObjective(beta=0.5, lambda_=0.0)))


def _answers(scored: Any) -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in scored.group.samples] + [scored.group.prompt.reference_ids]
