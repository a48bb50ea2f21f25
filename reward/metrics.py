"""Win, tie and loss rates, RAS and NAG, as pure functions of rewards. All results are shares from 0 to 1, or -1 to 1.

The paper (arXiv 2508.07750) defines RAS by R(o, y) > 0, o an answer of the policy and y the reference, and NAG by
R(post) > R(pre), answers of the trained and of the start model to the same prompt. Its text also counts ties for RAS,
and its table has a negative NAG, which no rate can be; so both readings of each are given.

Pairs are formed by position. For a pointwise reward the pair is (r(q, o), r(q, y)); a pairwise judge gives R(o, y) in
{1, 0, -1} and R(y, y) = 0, so the same comparison serves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reward.types import ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Shares of pairs in which the first reward is above, equal to and below the second; they sum to 1."""

    win: float
    tie: float
    loss: float
    pairs: int


def rates(rewards: Sequence[float], others: Sequence[float]) -> Rates:
    """Compare pair by pair. Values that differ by rounding alone tie: weighted sums do so.

    Raises ValueError for no pairs, unequal lengths, and values that are not finite.
    """
    if len(rewards) != len(others):
        raise ValueError(f"{len(rewards)} rewards cannot be paired with {len(others)}")
    if not rewards:
        raise ValueError("there are no rewards to compare")
    if not all(math.isfinite(value) for value in (*rewards, *others)):
        raise ValueError("rewards must be finite")
    signs = [_sign(one, other) for one, other in zip(rewards, others, strict=True)]
    return Rates(
        win=signs.count(1) / len(signs),
        tie=signs.count(0) / len(signs),
        loss=signs.count(-1) / len(signs),
        pairs=len(signs),
    )


def ras(answers: Sequence[float], references: Sequence[float]) -> float:
    """Relative adversarial score, strict: the share of answers that beat their reference answer."""
    return rates(answers, references).win


def ras_win_or_tie(answers: Sequence[float], references: Sequence[float]) -> float:
    """The share of answers that beat or equal their reference answer."""
    found = rates(answers, references)
    return found.win + found.tie


def nag_rate(post: Sequence[float], pre: Sequence[float]) -> float:
    """The share of prompts whose answer after training beats that before training, from 0 to 1."""
    return rates(post, pre).win


def nag(post: Sequence[float], pre: Sequence[float]) -> float:
    """Normalized alignment gain, net: wins minus losses of after against before training, from -1 to 1."""
    found = rates(post, pre)
    return found.win - found.loss


def nag_by_prompt(post: Sequence[ScoredGroup], pre: Mapping[str, Sequence[float]]) -> list[tuple[float, float]]:
    """(rate, net) of each prompt: its i-th answer after training against its i-th before, whose rewards `pre` has by
    prompt id.

    Raises ValueError where the prompts differ.
    """
    if {scored.group.prompt.id for scored in post} != pre.keys():
        raise ValueError("the two evaluations have different prompts")
    pairs = [rates(scored.rewards, pre[scored.group.prompt.id]) for scored in post]
    return [(found.win, found.win - found.loss) for found in pairs]


def against_references(groups: Sequence[ScoredGroup]) -> Rates:
    """Every sample against the reference answer of its own prompt; prompts without one are left out.

    Raises ValueError where no prompt has one.
    """
    answered = [group for group in groups if group.group.prompt.has_reference]
    pairs = [(reward, group.reference_reward) for group in answered for reward in group.rewards]
    return rates([reward for reward, _ in pairs], [reference for _, reference in pairs])


def _sign(one: float, other: float) -> int:
    if math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12):
        return 0
    return 1 if one > other else -1
