"""The objective by itself: advantages, weights, terms. The whole loss is in test_loss_reference.py."""

from __future__ import annotations

import random
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.objectives import GraoObjective
from configs.schema import LearnerConfig
from learner.objectives import grao
from learner.objectives.build import objective_at
from learner.objectives.grao import Grao
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
        assert max([*values, reference]) == pytest.approx(min([*values, reference]), rel=1e-8, abs=1e-11)
        assert set(everything) == {0.0}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("equal", [0.0, 0.1, -3e8])
def test_equal_rewards_have_no_signal(reading: Any, equal: float) -> None:
    found = grao.advantages([equal] * 3, equal, reading)
    assert found == grao.Advantages(samples=(0.0,) * 3, reference=0.0, has_signal=False)


def test_rounding_is_no_signal() -> None:
    assert not grao.advantages([0.1 + 0.2, 0.3], 0.3, "samples_and_reference").has_signal
    assert grao.advantages([1e-6, 2e-6], 0.0, "samples_and_reference").has_signal


def test_equal_samples_against_a_better_reference() -> None:
    found = grao.advantages([0.0] * 4, 1.0, "samples_and_reference")
    assert found.reference == pytest.approx(2)  # sqrt(G)
    assert found.samples == pytest.approx((-0.5,) * 4)
    assert not grao.advantages([0.0] * 4, 1.0, "samples").has_signal


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
