"""Dispatch, replacement and retry of workers, with workers of the test that die when told to."""

from __future__ import annotations

import asyncio

import pytest

from cluster.workers.fleet import Fleet, FleetError


class Death(Exception):
    """A worker's process is gone."""


class Calculator:
    """A worker that squares numbers until it is killed."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.dead = asyncio.Event()
        self.ended = False
        self.calls = 0

    async def square(self, value: int, seconds: float = 0.0) -> int:
        self.calls += 1
        dying = asyncio.ensure_future(self.dead.wait())
        done, _ = await asyncio.wait({dying}, timeout=seconds)
        dying.cancel()
        if done or self.dead.is_set():
            raise Death("killed")
        return value * value

    async def close(self) -> None:
        self.ended = True

    def end(self) -> None:
        self.ended = True


def fleet_of(size: int, made: list[Calculator], limit: int = 3) -> Fleet[Calculator]:
    async def spawn(number: int) -> Calculator:
        made.append(Calculator(number))
        return made[-1]

    return Fleet("test", size, spawn, lambda error: isinstance(error, Death), limit)


async def test_calls_go_to_the_least_loaded_worker() -> None:
    made: list[Calculator] = []
    fleet = fleet_of(3, made)
    await fleet.start()
    answers = await asyncio.gather(*(fleet.run(lambda w, n=n: w.square(n, 0.05)) for n in range(9)))
    assert answers == [n * n for n in range(9)]
    assert [worker.calls for worker in made] == [3, 3, 3]


async def test_a_dead_worker_is_replaced_and_its_calls_are_made_again() -> None:
    made: list[Calculator] = []
    fleet = fleet_of(2, made)
    await fleet.start()
    calls = [asyncio.ensure_future(fleet.run(lambda w, n=n: w.square(n, 0.1))) for n in range(8)]
    await asyncio.sleep(0.02)
    made[0].dead.set()
    assert await asyncio.gather(*calls) == [n * n for n in range(8)]
    assert fleet.replaced == 1
    assert made[0].ended
    assert made[2].number == 0


async def test_everywhere_asks_every_worker_and_the_replacement_of_a_dead_one() -> None:
    made: list[Calculator] = []
    fleet = fleet_of(3, made)
    await fleet.start()
    made[1].dead.set()
    assert await fleet.everywhere(lambda worker: worker.square(worker.number)) == [0, 1, 4]
    assert [worker.number for worker in made] == [0, 1, 2, 1]


async def test_an_error_that_is_no_death_is_raised_and_replaces_nobody() -> None:
    made: list[Calculator] = []
    fleet = fleet_of(1, made)
    await fleet.start()

    async def wrong(worker: Calculator) -> int:
        raise ValueError("a fault of the call")

    with pytest.raises(ValueError, match="a fault of the call"):
        await fleet.run(wrong)
    assert len(made) == 1
    assert await fleet.run(lambda worker: worker.square(2)) == 4


async def test_workers_that_die_again_and_again_end_the_run() -> None:
    made: list[Calculator] = []
    fleet = fleet_of(1, made, limit=2)
    await fleet.start()

    async def deadly(worker: Calculator) -> int:
        raise Death("out of memory")

    with pytest.raises(FleetError, match="test workers keep dying, the last one of: Death: out of memory"):
        await fleet.run(deadly)
    assert len(made) == 3


async def test_close_ends_every_worker() -> None:
    made: list[Calculator] = []
    fleet = fleet_of(2, made)
    await fleet.start()
    await fleet.close()
    assert all(worker.ended for worker in made)
