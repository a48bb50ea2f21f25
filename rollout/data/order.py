"""Which prompt comes at which position of a run: pure functions, so a resumed run needs only the position."""

from __future__ import annotations

import functools
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Protocol

FINEST = 10_000
"""Positions after which a mixture's pattern begins again, at most: shares are exact to one in so many."""


class Order(Protocol):
    """What the loop asks."""

    def at(self, position: int) -> int:
        """Index of the prompt at a position, which counts from 0 over all passes."""


@dataclass(frozen=True, slots=True)
class PromptOrder:
    """One source, or several of which one pass has every row once.

    Every pass over the data is a new permutation, seeded by (seed, pass); without shuffle it is the data's order.
    """

    count: int
    """Prompts in the data, at least 1."""
    seed: int
    shuffle: bool

    def at(self, position: int) -> int:
        """Index in [0, count) of the prompt at a position, which counts from 0 over all passes."""
        data_pass, place = divmod(position, self.count)
        return _permutation(self.count, self.seed, data_pass)[place] if self.shuffle else place


@dataclass(frozen=True, slots=True)
class MixedOrder:
    """Several sources by their weights, each going through its own rows in passes of its own.

    The sources take turns in a fixed pattern: up to any position each of S sources has had its weight's share of the
    positions, to within (S + 1) / 2 of them. Which rows of a source come is what PromptOrder says of that
    source alone, so every row comes once before any comes twice, and a small source with a large weight is gone
    through more often.
    """

    counts: tuple[int, ...]
    """Prompts of each source, at least 1; they stand one source after the other."""
    weights: tuple[float, ...]
    seed: int
    shuffle: bool

    def at(self, position: int) -> int:
        """Index in [0, sum of counts) of the prompt at a position."""
        source, place = self.turn(position)
        seed = self.seed if source == 0 else (self.seed << 16) + source
        return sum(self.counts[:source]) + PromptOrder(self.counts[source], seed, self.shuffle).at(place)

    def turn(self, position: int) -> tuple[int, int]:
        """Which source has a position, and how many positions it had before."""
        sources, earlier, shares = _pattern(self.weights)
        whole, place = divmod(position, len(sources))
        source = sources[place]
        return source, whole * shares[source] + earlier[place]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided by weights into whole numbers that sum to it: each its share rounded down, the rest to those
    that lost most by that (largest remainder)."""
    exact = [Fraction(weight) for weight in weights]
    shares = [total * weight / sum(exact) for weight in exact]
    whole = [int(share) for share in shares]
    first = sorted(range(len(shares)), key=lambda index: (whole[index] - shares[index], index))
    for index in first[: total - sum(whole)]:
        whole[index] += 1
    return whole


@functools.lru_cache(maxsize=4)
def _pattern(weights: tuple[float, ...]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The sources' turns, how many turns of its own each of them had before, and how many each source has in all.

    Source s with c of n turns has its k-th at (k + 1/2) / c: as evenly as can be (Webster's method as a sequence).
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    length = lcm(*(share.denominator for share in shares))
    if length > FINEST:
        length = FINEST
    counts = [max(1, count) for count in apportion(length, [float(share) for share in shares])]
    turns = sorted(
        (Fraction(2 * turn + 1, 2 * count), source, turn)
        for source, count in enumerate(counts)
        for turn in range(count)
    )
    return array("q", [source for _, source, _ in turns]), array("q", [turn for _, _, turn in turns]), counts


@functools.lru_cache(maxsize=16)  # the passes in use, of every source: at the end of one the next begins
def _permutation(count: int, seed: int, data_pass: int) -> Sequence[int]:
    indices = array("q", range(count))
    random.Random(f"{seed}/{data_pass}").shuffle(indices)
    return indices
