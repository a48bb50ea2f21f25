"""Dispatch, replacement and retry of workers, with workers of the test that die when told to."""

from __future__ import annotations

import asyncio

import pytest

from cluster.workers.fleet import Fleet, FleetError, Limit
from tests.fast.virtual_time import run as in_virtual_time


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


async def test_a_replacement_that_dies_while_it_starts_counts_and_another_one_is_started() -> None:
    made: list[Calculator] = []

    async def spawn(number: int) -> Calculator:
        made.append(Calculator(number))
        if len(made) == 3:
            raise Death("killed while it started")
        return made[-1]

    fleet = Fleet("test", 2, spawn, lambda error: isinstance(error, Death), 3)
    await fleet.start()
    made[0].dead.set()
    assert await asyncio.gather(*(fleet.run(lambda w, n=n: w.square(n, 0.01)) for n in range(6))) == [
        n * n for n in range(6)
    ]
    assert (len(made), fleet.replaced) == (4, 2)


async def test_nobody_waits_for_a_worker_that_cannot_be_replaced() -> None:
    made: list[Calculator] = []

    async def spawn(number: int) -> Calculator:
        made.append(Calculator(number))
        if len(made) > 1:
            await asyncio.sleep(0.01)
            raise Death("killed while it started")
        return made[-1]

    fleet = Fleet("test", 1, spawn, lambda error: isinstance(error, Death), 2)
    await fleet.start()
    made[0].dead.set()
    calls = [asyncio.ensure_future(fleet.run(lambda w, n=n: w.square(n))) for n in range(4)]
    calls.append(asyncio.ensure_future(fleet.everywhere(lambda worker: worker.square(1))))
    async with asyncio.timeout(10):
        found = await asyncio.gather(*calls, return_exceptions=True)
    said = "test workers keep dying, the last one of: Death: killed while it started"
    assert {(type(one), str(one)) for one in found} == {(FleetError, said)}
    assert len(made) == 3


def test_a_silent_worker_is_replaced_when_its_call_is_over_the_limit() -> None:
    made: list[Calculator] = []
    limit = Limit(seconds=60, setting="test.timeout_s")

    async def answer(worker: Calculator) -> int:
        if worker is made[0]:
            await asyncio.Event().wait()
        return worker.number

    async def go() -> list[int]:
        fleet = fleet_of(2, made)
        await fleet.start()
        first = await fleet.everywhere(answer, limit)
        assert (len(made), made[0].ended, fleet.replaced) == (3, True, 1)
        return [*first, await fleet.run(answer, limit)]

    assert in_virtual_time(go()) == [0, 1, 0]


def test_workers_that_stay_silent_end_the_run_with_the_setting() -> None:
    async def silent(worker: Calculator) -> int:
        await asyncio.Event().wait()
        return 0

    async def go(everywhere: bool) -> None:
        fleet = fleet_of(1, [], limit=2)
        await fleet.start()
        limit = Limit(seconds=60, setting="test.timeout_s")
        await (fleet.everywhere(silent, limit) if everywhere else fleet.run(silent, limit))

    for everywhere in (True, False):
        with pytest.raises(FleetError, match=r"the last one of: Silence: no answer within test.timeout_s \(60 s\)"):
            in_virtual_time(go(everywhere))


async def test_a_time_out_inside_a_call_is_the_calls_own() -> None:
    made: list[Calculator] = []
    fleet = fleet_of(1, made)
    await fleet.start()

    async def slow(worker: Calculator) -> int:
        raise TimeoutError("the judge took too long")

    with pytest.raises(TimeoutError, match="the judge took too long"):
        await fleet.run(slow, Limit(seconds=60, setting="test.timeout_s"))
    assert len(made) == 1
