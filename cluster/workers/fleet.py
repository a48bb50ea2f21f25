"""Interchangeable workers: the least loaded one gets the next call; one that dies is replaced and its calls retried.

Who waits for whom: `run` waits for a living worker and then for its answer; `everywhere` waits for all workers. A
worker that dies while it answers is replaced once, by whichever call noticed first; the others wait for the new one.
A worker that is alive and silent beyond a call's limit is taken for dead. A replacement that dies while it starts
counts as one and is tried again. Once nobody can be replaced any more, every call fails, also those that wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Answer = TypeVar("Answer")


class Worker(Protocol):
    """A living worker: how it is called lies with the caller of the fleet."""

    async def close(self) -> None:
        """End the worker in good order. Never raises for one that is dead."""

    def end(self) -> None:
        """End the worker's process at once. Never raises for one that is dead."""


W = TypeVar("W", bound=Worker)


class FleetError(RuntimeError):
    """Workers keep dying. One line that names the fleet and the last cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How long a worker may take for one call before it is replaced."""

    seconds: float
    setting: str
    """The setting that says so, for the error."""


class Silence(RuntimeError):
    """A worker gave no answer within its limit."""


class _Seat(Generic[W]):
    """One place of the fleet; its worker changes when it dies."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.worker: W | None = None
        self.load = 0
        self.ready = asyncio.Event()


class Fleet(Generic[W]):
    """`size` workers made by `spawn(seat number)`, which returns a started worker or raises."""

    def __init__(
        self,
        name: str,
        size: int,
        spawn: Callable[[int], Awaitable[W]],
        is_death: Callable[[BaseException], bool],
        max_replacements: int = 3,
    ) -> None:
        self._name = name
        self._spawn = spawn
        self._is_death = is_death
        self._replacements_left = max_replacements * size
        self._seats: list[_Seat[W]] = [_Seat(number) for number in range(size)]
        self._changed = asyncio.Condition()
        self._failure: BaseException | None = None
        """Why no call can be answered any more."""
        self.replaced = 0

    @property
    def size(self) -> int:
        return len(self._seats)

    async def start(self) -> None:
        """Start all workers at once. Raises what `spawn` raises."""
        await asyncio.gather(*(self._fill(seat) for seat in self._seats))

    async def run(self, call: Callable[[W], Awaitable[Answer]], limit: Limit | None = None) -> Answer:
        """The answer of the least loaded worker. A dead or silent worker's call is made again on another one."""
        while True:
            seat = await self._take_seat()
            try:
                answered = await self._ask(seat, call, limit)
            finally:
                await self._leave(seat)
            if answered:
                return answered[0]

    async def everywhere(self, call: Callable[[W], Awaitable[Answer]], limit: Limit | None = None) -> list[Answer]:
        """The answers of all workers, by seat. A worker that dies or stays silent is replaced and asked again."""

        async def at(seat: _Seat[W]) -> Answer:
            while True:
                await self._until_ready(seat)
                answered = await self._ask(seat, call, limit)
                if answered:
                    return answered[0]

        return list(await asyncio.gather(*(at(seat) for seat in self._seats)))

    async def close(self) -> None:
        """End every worker."""
        workers = [seat.worker for seat in self._seats if seat.worker is not None]
        for seat in self._seats:
            seat.ready.clear()
            seat.worker = None
        await asyncio.gather(*(worker.close() for worker in workers))

    async def _ask(
        self, seat: _Seat[W], call: Callable[[W], Awaitable[Answer]], limit: Limit | None
    ) -> tuple[Answer] | None:
        """The answer of the seat's worker; None where it was lost, and by now has been replaced."""
        worker = seat.worker
        assert worker is not None
        try:
            return (await within(limit, call(worker)),)
        except Exception as error:
            if not self._is_lost(error):
                raise
            await self._replace(seat, worker, error)
            return None

    def _is_lost(self, error: BaseException) -> bool:
        return isinstance(error, Silence) or self._is_death(error)

    async def _take_seat(self) -> _Seat[W]:
        def can_go_on() -> bool:
            return self._failure is not None or any(seat.ready.is_set() for seat in self._seats)

        async with self._changed:
            await self._changed.wait_for(can_go_on)
            if self._failure is not None:
                raise self._failure
            seat = min((seat for seat in self._seats if seat.ready.is_set()), key=lambda seat: seat.load)
            seat.load += 1
            return seat

    async def _until_ready(self, seat: _Seat[W]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or seat.ready.is_set())
            if self._failure is not None:
                raise self._failure

    async def _leave(self, seat: _Seat[W]) -> None:
        async with self._changed:
            seat.load -= 1
            self._changed.notify_all()

    async def _fill(self, seat: _Seat[W]) -> None:
        seat.worker = await self._spawn(seat.number)
        seat.ready.set()
        async with self._changed:
            self._changed.notify_all()

    async def _replace(self, seat: _Seat[W], dead: W, cause: BaseException) -> None:
        if seat.worker is not dead:  # somebody else noticed first
            await self._until_ready(seat)
            return
        seat.ready.clear()
        seat.worker = None
        dead.end()
        try:
            await self._fill_again(seat, cause)
        except BaseException as error:
            async with self._changed:  # else those who wait for this seat would wait for ever
                self._failure = error
                self._changed.notify_all()
            raise

    async def _fill_again(self, seat: _Seat[W], cause: BaseException) -> None:
        """A new worker for the seat; one that dies while it starts counts, and another one is tried."""
        while True:
            if self._replacements_left == 0:
                raise FleetError(f"{self._name} workers keep dying, the last one of: {_line(cause)}") from cause
            self._replacements_left -= 1
            self.replaced += 1
            try:
                return await self._fill(seat)
            except Exception as error:
                if not self._is_lost(error):
                    raise
                cause = error


async def within(limit: Limit | None, answer: Awaitable[Answer]) -> Answer:
    """The answer. Raises Silence where it takes longer than the limit."""
    if limit is None:
        return await answer
    clock = asyncio.timeout(limit.seconds)
    try:
        async with clock:
            return await answer
    except TimeoutError as error:
        if not clock.expired():  # a time-out of the call's own
            raise
        raise Silence(f"no answer within {limit.setting} ({limit.seconds:g} s)") from error


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
