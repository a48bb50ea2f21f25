"""Win, tie and loss rates, RAS and NAG."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.metrics import against_references, nag, nag_rate, ras, ras_win_or_tie, rates
from reward.types import Breakdown, ScoredGroup
from tests.reward_groups import group

# A few values, so that ties are common.
VALUES = st.sampled_from([-1.0, 0.0, 0.1, 0.3, 1.0, 1e9])
PAIRS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=50)


def split(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [one for one, _ in pairs], [other for _, other in pairs]


def test_by_hand() -> None:
    found = rates([1.0, 0.5, 0.0, 2.0], [0.0, 0.5, 1.0, 1.0])
    assert (found.win, found.tie, found.loss, found.pairs) == (0.5, 0.25, 0.25, 4)
    assert ras([1.0, 0.5, 0.0, 2.0], [0.0, 0.5, 1.0, 1.0]) == 0.5
    assert ras_win_or_tie([1.0, 0.5, 0.0, 2.0], [0.0, 0.5, 1.0, 1.0]) == 0.75
    assert nag_rate([1.0, 0.0, 0.0], [0.0, 1.0, 1.0]) == pytest.approx(1 / 3)
    assert nag([1.0, 0.0, 0.0], [0.0, 1.0, 1.0]) == pytest.approx(-1 / 3)


def test_the_verdicts_of_a_pairwise_judge() -> None:
    assert ras([1, 1, 0, -1], [0, 0, 0, 0]) == 0.5
    assert ras_win_or_tie([1, 1, 0, -1], [0, 0, 0, 0]) == 0.75


def test_sums_that_differ_by_rounding_tie() -> None:
    assert rates([0.1 + 0.2], [0.3]).tie == 1.0


@given(PAIRS)
def test_shares_sum_to_one_and_equal_a_naive_count(pairs: list[tuple[float, float]]) -> None:
    found = rates(*split(pairs))
    assert found.win + found.tie + found.loss == pytest.approx(1.0)
    assert round(found.win * len(pairs)) == sum(one > other for one, other in pairs)
    assert round(found.tie * len(pairs)) == sum(one == other for one, other in pairs)
    assert found.pairs == len(pairs)


@given(PAIRS)
def test_exchanging_the_sides_exchanges_win_and_loss(pairs: list[tuple[float, float]]) -> None:
    one, other = split(pairs)
    there, back = rates(one, other), rates(other, one)
    assert (there.win, there.tie, there.loss) == (back.loss, back.tie, back.win)
    assert nag(one, other) == -nag(other, one)


@given(PAIRS)
def test_the_readings_agree(pairs: list[tuple[float, float]]) -> None:
    one, other = split(pairs)
    assert ras_win_or_tie(one, other) == pytest.approx(1.0 - nag_rate(other, one))
    assert nag(one, other) == pytest.approx(nag_rate(one, other) - nag_rate(other, one))
    assert -1.0 <= nag(one, other) <= nag_rate(one, other) <= 1.0


@given(PAIRS, st.integers(2, 4))
def test_repeating_the_data_changes_nothing(pairs: list[tuple[float, float]], times: int) -> None:
    assert nag(*split(pairs * times)) == pytest.approx(nag(*split(pairs)))
    assert ras(*split(pairs * times)) == pytest.approx(ras(*split(pairs)))


def test_samples_are_compared_with_their_own_reference() -> None:
    def scored(rewards: tuple[float, ...], reference: float) -> ScoredGroup:
        part = Breakdown(samples=rewards, reference=reference)
        texts = ["x"] * len(rewards)
        return ScoredGroup(group=group(*texts), rewards=rewards, reference_reward=reference, breakdown={"a": part})

    found = against_references([scored((1.0, 0.0, 0.5), 0.5), scored((2.0,), 3.0)])
    assert (found.win, found.tie, found.loss, found.pairs) == (0.25, 0.25, 0.5, 4)


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ([], [], "no rewards"),
        ([1.0], [1.0, 2.0], "1 rewards cannot be paired with 2"),
        ([float("nan")], [1.0], "finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(one: list[float], other: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rates(one, other)
