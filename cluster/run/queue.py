"""Numbered tickets between the feeding of prompts and the learner: bounded work, bounded staleness.

Ticket t is the prompt at position t of the seeded order. A ticket lives from `ticket()` over `put` and `take` until
`release`, which the driver calls when the new parameters are live in every rollout worker; at most (S + 1) * B live
at a time (S the allowed staleness, B the groups of a step). So nothing starts under parameters that are already old.

Why no group is ever staler than S. Write born(t) for the updates released when t was handed out, and w for the
version that the next step starts from. A step may take a set of finished groups only if those left behind, trained
in ticket order from the next step on, keep the bound:

    w + 1 + i // B - born(t_i) <= S        for the i-th ticket left behind, t_0 < t_1 < ...

A new ticket is the last of at most (S + 1) * B living ones, so it meets the condition when it is born; and whenever
the condition holds, taking the oldest B tickets keeps it. So the oldest B are always a lawful choice: the learner
waits for them at worst, never breaks the bound, never waits for ever. Finished groups overtake slow ones as far as
the condition allows, which is not at all with S = 0, where a step takes exactly its B tickets.

(Anchoring the window of tickets at the oldest one and taking whatever is finished does not hold the bound: with
S = 1 and B = 2, tickets 4 and 5 overtake 2 and 3, which then are trained at age 2.)

One event loop; no method here may be called from another thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from reward.types import ScoredGroup


class StalenessError(RuntimeError):
    """A sample is staler than allowed, or newer than the learner: a fault of the queue or of the weight sync."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Which tickets are trained: all below `oldest`, and those in `ahead`."""

    oldest: int = 0
    """The oldest ticket not yet trained."""
    ahead: frozenset[int] = frozenset()
    """Trained tickets above it: groups that overtook it."""

    def __post_init__(self) -> None:
        if self.oldest < 0 or any(ticket <= self.oldest for ticket in self.ahead):
            raise ValueError(f"no position: oldest {self.oldest}, trained ahead of it {sorted(self.ahead)}")

    def after(self, tickets: Iterable[int]) -> Position:
        """The position once these tickets are trained too. Raises ValueError if one already was."""
        trained = set(self.ahead)
        for ticket in tickets:
            if ticket < self.oldest or ticket in trained:
                raise ValueError(f"ticket {ticket} is trained twice")
            trained.add(ticket)
        oldest = self.oldest
        while oldest in trained:
            trained.remove(oldest)
            oldest += 1
        return Position(oldest=oldest, ahead=frozenset(trained))


class TicketQueue:
    """Hands out tickets in order and collects scored groups; see the top of this file for the rules.

    `start` and `done` (a Position's `oldest` and `ahead`) continue a run: no prompt is repeated or left out.
    Every method that waits may be cancelled: it then has changed nothing. After `fail` every call raises.
    """

    def __init__(
        self, groups_per_step: int, max_staleness: int, start: int = 0, done: frozenset[int] = frozenset()
    ) -> None:
        if groups_per_step < 1 or max_staleness < 0:
            raise ValueError(f"no queue for {groups_per_step} groups per step and staleness {max_staleness}")
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._position = Position(oldest=start, ahead=done)
        self._next = start
        self._born: dict[int, int] = {}  # untrained tickets, ascending -> updates released when handed out
        self._finished: dict[int, ScoredGroup] = {}
        self._in_training: deque[tuple[int, ...]] = deque()
        self._taken = 0  # batches given to the learner = version (from this queue's start) of the next step's start
        self._released = 0
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    async def ticket(self) -> int:
        """The next prompt position; waits while (S + 1) * B tickets live."""
        await self._until(self._has_room)
        ticket = self._next
        while ticket in self._position.ahead:
            ticket += 1
        self._next = ticket + 1
        self._born[ticket] = self._released
        return ticket

    async def put(self, ticket: int, group: ScoredGroup) -> None:
        """The finished group of a ticket. Raises ValueError for a ticket that is not waited for."""
        self._check()
        if ticket not in self._born or ticket in self._finished:
            raise ValueError(f"ticket {ticket} is not waited for: it was never handed out, or its group is here")
        self._finished[ticket] = group
        self._notify()

    async def take(self, n: int) -> list[tuple[int, ScoredGroup]]:
        """The groups of the next step, sorted by ticket; waits for them. `n` must be B."""
        self._check_count(n)
        await self._until(lambda: self._choice() is not None)
        chosen = self._choice()
        assert chosen is not None
        for ticket in chosen:
            del self._born[ticket]
        self._in_training.append(chosen)
        self._taken += 1
        return [(ticket, self._finished.pop(ticket)) for ticket in chosen]

    async def release(self, n: int) -> None:
        """The oldest taken batch is trained and its parameters are live everywhere: its n tickets make room."""
        self._check()
        self._check_count(n)
        if not self._in_training:
            raise ValueError("release without take: no batch is in training")
        self._position = self._position.after(self._in_training.popleft())
        self._released += 1
        self._notify()

    def fail(self, error: BaseException) -> None:
        """Wake everybody who waits here with this error; the first error stays."""
        if self._error is None:
            self._error = error
            self._notify()

    def state(self) -> Position:
        """Where a resumed run goes on: tickets count as trained from their release."""
        return self._position

    def _choice(self) -> tuple[int, ...] | None:
        """The oldest B finished tickets if those left behind keep the bound, else None."""
        size = self._groups_per_step
        chosen = tuple(sorted(self._finished)[:size])
        if len(chosen) < size:
            return None
        taken = set(chosen)
        left = (born for ticket, born in self._born.items() if ticket not in taken)
        keeps = all(self._taken + 1 + i // size - born <= self._max_staleness for i, born in enumerate(left))
        return chosen if keeps else None

    def _has_room(self) -> bool:
        living = len(self._born) + len(self._in_training) * self._groups_per_step
        return living < (self._max_staleness + 1) * self._groups_per_step

    async def _until(self, ready: Callable[[], bool]) -> None:
        # No lock: callers change state between this return and their next await, so nothing runs in between.
        self._check()
        while not ready():
            await self._changed.wait()
            self._check()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _check_count(self, n: int) -> None:
        if n != self._groups_per_step:
            raise ValueError(f"a step takes and releases {self._groups_per_step} groups, not {n}")


def check_staleness(groups: Sequence[ScoredGroup], version: int, bound: int) -> None:
    """Raise StalenessError unless every sample was begun at most `bound` updates before `version`.

    `version` is the one the trained step starts from. The queue keeps the bound by construction; this is the check
    at run time that workers really had the parameters they were said to have.
    """
    for scored in groups:
        prompt, samples = scored.group.prompt, scored.group.samples
        ages = [version - sample.first_version for sample in samples]
        if max(ages, default=0) > bound:
            raise StalenessError(
                f"prompt '{prompt.id}': sample {ages.index(max(ages))} is {max(ages)} updates old at version {version};"
                f" rollout.max_staleness allows {bound}"
            )
        newer = [sample.last_version for sample in samples if sample.last_version > version]
        if newer:
            raise StalenessError(f"prompt '{prompt.id}': a sample has version {newer[0]}, the learner only {version}")
