"""Cutting pieces into micro-batches: each once, within the budget, little padding, as few and as even as can be."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batches import PADDING, Dealt, fill, pad

PAIRS = 12_288
LENGTHS: dict[str, Callable[[random.Random], int]] = {
    "uniform": lambda draw: draw.randint(384, 1536),
    "hh": lambda draw: draw.randint(60, 200) + draw.randint(10, 80),
    "gsm8k": lambda draw: 97 + int(draw.gauss(155, 60)) % 400,
    "reasoning": lambda draw: draw.randint(200, 400) + min(8000, int(draw.lognormvariate(7.5, 0.8))),
    "lognormal": lambda draw: min(16_384, int(math.exp(draw.gauss(6, 1))) + 2),
    "geometric": lambda draw: int(2 ** draw.uniform(3, 13.9)),
    "two lengths": lambda draw: draw.choice([100, 4000]),
    "few long": lambda draw: 16_000 if draw.random() < 0.02 else draw.randint(50, 120),
    "equal": lambda draw: 777,
}


def cost(length: int) -> float:
    return length + length**2 / 2 / PAIRS


def padded(lengths: Sequence[int], ranks: int, budget: int, widths: Sequence[int] | None = None) -> Dealt:
    return pad(widths or [1] * len(lengths), lengths, [cost(one) for one in lengths], ranks, budget)


def check(dealt: Dealt, widths: Sequence[int], longest: Sequence[int], ranks: int, budget: int) -> float:
    """Each piece once, as many micro-batches on each rank, none too large. Returns how much is computed for each of the
    pieces' own positions."""
    assert all(len(members) == ranks for members in dealt.rounds)
    pieces = [piece for members in dealt.rounds for one in members for piece in one]
    assert sorted(pieces) == list(range(len(longest)))
    computed = 0
    for one in (one for members in dealt.rounds for one in members if one):
        size = sum(widths[piece] for piece in one) * max(longest[piece] for piece in one)
        assert size <= budget
        computed += size
    own = sum(width * length for width, length in zip(widths, longest, strict=True))
    return computed / own if own else 1.0


def longest_runs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """In order of length, one batch after the other, each as full as the budget allows: none can be fewer."""
    batches: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        if not batches or (len(batches[-1]) + 1) * batches[-1][0] > budget:
            batches.append([])
        batches[-1].append(length)
    return batches


def fewest(lengths: Sequence[int], budget: int) -> int:
    """Batches of at most PADDING times the real positions: by trying all runs, with one more batch at a time."""
    ordered = sorted(lengths, reverse=True)
    least = [0.0] + [math.inf] * len(ordered)
    for count in range(1, len(ordered) + 1):
        more = [math.inf] * (len(ordered) + 1)
        for start in range(len(ordered)):
            for end in range(start + 1, min(len(ordered), start + budget // ordered[start]) + 1):
                more[end] = min(more[end], least[start] + (end - start) * ordered[start])
        least = more
        if least[-1] <= PADDING * sum(ordered):
            return count
    raise AssertionError("one row in each batch has no padding")


@settings(max_examples=30)
@given(
    kind=st.sampled_from(sorted(LENGTHS)),
    seed=st.integers(0, 10**6),
    count=st.integers(0, 200),
    ranks=st.integers(1, 9),
    width=st.integers(1, 3),
)
def test_padding_is_at_most_a_twentieth(kind: str, seed: int, count: int, ranks: int, width: int) -> None:
    """For any lengths, in no more rounds than are stated: one more than plain runs need where those pad little."""
    draw, budget = random.Random(seed), 49_152
    lengths = [LENGTHS[kind](draw) for _ in range(count)]
    dealt = padded(lengths, ranks, budget, [width] * count)
    assert check(dealt, [width] * count, lengths, ranks, budget) <= PADDING
    assert dealt == padded(lengths, ranks, budget, [width] * count)
    if not lengths:
        assert dealt.rounds == (((),) * ranks,)
        return
    plain = longest_runs(lengths, budget // width)
    spread = math.log(max(lengths) / min(lengths)) / math.log(PADDING)
    if sum(len(one) * one[0] for one in plain) <= PADDING * sum(lengths):
        spread = 0.0
    assert -(-len(plain) // ranks) <= len(dealt.rounds) <= -(-int(len(plain) + spread) // ranks) + 1


@settings(max_examples=40)
@given(data=st.data(), ranks=st.integers(1, 5))
def test_pieces_of_any_widths_keep_the_budget(data: st.DataObject, ranks: int) -> None:
    sizes = st.tuples(st.integers(1, 6), st.integers(1, 60))
    pieces = data.draw(st.lists(sizes, max_size=60))
    widths, longest = [width for width, _ in pieces], [length for _, length in pieces]
    budget = data.draw(st.integers(max((w * n for w, n in pieces), default=1), 2000))
    assert check(padded(longest, ranks, budget, widths), widths, longest, ranks, budget) <= PADDING


@pytest.mark.parametrize("kind", sorted(LENGTHS))
def test_rounds_are_as_few_as_can_be(kind: str) -> None:
    draw = random.Random(7)
    for count in (9, 72):
        lengths = [LENGTHS[kind](draw) for _ in range(count)]
        assert len(padded(lengths, 1, 16_384).rounds) == fewest(lengths, 16_384)


def test_two_rows_of_different_lengths_are_not_padded_to_each_other() -> None:
    assert padded([1000, 10], 1, 4096).rounds == (((0,),), ((1,),))
    assert padded([1000, 960], 1, 4096).rounds == (((0, 1),),)  # 2000 for 1960


@pytest.mark.parametrize("ranks", [4, 8, 32])
@pytest.mark.parametrize("kind", ["uniform", "hh", "gsm8k", "reasoning"])
def test_ranks_wait_little(kind: str, ranks: int) -> None:
    draw = random.Random(3)
    lengths = [LENGTHS[kind](draw) for _ in range(576)]
    dealt = padded(lengths, ranks, 16_384)
    by_rounds = [[len(one) * cost(max((lengths[p] for p in one), default=0)) for one in k] for k in dealt.rounds]
    assert dealt.duration == pytest.approx(sum(map(max, by_rounds)))
    assert dealt.duration * ranks <= 1.1 * sum(map(sum, by_rounds))
    totals = [sum(costs[rank] for costs in by_rounds) for rank in range(ranks)]
    assert max(totals) <= 1.1 * sum(totals) / ranks


def test_many_rows_are_cut_between_small_sets_of_them() -> None:
    """More rows than places: cuts are looked for between sets of nearly equal lengths, and long rows stay apart."""
    draw = random.Random(0)
    lengths = [draw.randint(20_000, 60_000) for _ in range(40)] + [draw.randint(50, 500) for _ in range(3000)]
    dealt = padded(lengths, 4, 65_536)
    assert check(dealt, [1] * len(lengths), lengths, 4, 65_536) <= PADDING
    assert len(dealt.rounds) <= -(-len(longest_runs(lengths, 65_536)) // 4) + 1


@settings(max_examples=60)
@given(data=st.data(), ranks=st.integers(1, 5))
def test_pieces_whose_sizes_add_up(data: st.DataObject, ranks: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 50), max_size=60))
    budget = data.draw(st.integers(max(sizes, default=1), 200))
    dealt = fill(sizes, [float(size) for size in sizes], ranks, budget)
    check(dealt, [1] * len(sizes), sizes, ranks, 10**6)
    filled = [sum(sizes[piece] for piece in one) for members in dealt.rounds for one in members]
    assert max(filled, default=0) <= budget
    # two micro-batches that fit into one would not both have been opened but for balance
    assert len(dealt.rounds) <= max(1, math.ceil(2 * sum(sizes) / budget / ranks) + 1)


def test_full_micro_batches_where_even_ones_would_be_more() -> None:
    """By cost: 6 | 4, then 4 beside 4, 3 beside 6, and no room for the last 3."""
    dealt = fill([6, 4, 4, 3, 3], [6.0, 4.0, 4.0, 3.0, 3.0], 1, 10)
    assert sorted(sorted(one) for [one] in dealt.rounds) == [[0, 1], [2, 3, 4]]
