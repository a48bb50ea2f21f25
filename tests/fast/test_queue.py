"""The ticket queue in virtual time: the bound on staleness, the bound on work, order, resume, cancellation, errors."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.run.queue import Position, StalenessError, TicketQueue, check_staleness
from reward.types import ScoredGroup
from rollout.types import Group, Prompt, Sample
from tests.fast import virtual_time


def scored(number: int, versions: tuple[int, ...], last: int | None = None) -> ScoredGroup:
    prompt = Prompt(
        messages=(),
        id=f"p{number}",
        token_ids=(1,),
        text="",
        reference_ids=(0,),
        reference_text="",
        rejected_ids=None,
        rejected_text=None,
        extra={},
    )
    samples = tuple(
        Sample(
            token_ids=(0,),
            logprobs=(-1.0,),
            first_version=version,
            last_version=version if last is None else last,
            finish="stop",
            text="",
        )
        for version in versions
    )
    return ScoredGroup(
        group=Group(prompt=prompt, samples=samples), rewards=(0.0,) * len(samples), reference_reward=0.0, breakdown={}
    )


@dataclass
class Run:
    """A driver with fakes around a real queue: generation and training only take (virtual) time."""

    groups_per_step: int
    max_staleness: int
    seed: int
    start: Position = field(default_factory=Position)
    first_version: int = 0
    engines: int = 10**6
    """Groups generated at the same time; the feed asks for a ticket only when one is free."""
    batches: list[list[int]] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    most_alive: int = 0
    issued: list[int] = field(default_factory=list)

    def play(self, steps: int) -> Position:
        return virtual_time.run(self._train(steps))

    async def _train(self, steps: int) -> Position:
        self.random = random.Random(self.seed)
        self.version = self.first_version
        self.alive = 0
        self.queue = TicketQueue(self.groups_per_step, self.max_staleness, self.start.oldest, self.start.ahead)
        slots = asyncio.Semaphore(self.engines)
        feeding = asyncio.create_task(self._feed(slots))
        for _ in range(steps):
            batch = await self.queue.take(self.groups_per_step)
            groups = [group for _, group in batch]
            check_staleness(groups, self.version, self.max_staleness)
            self.batches.append([ticket for ticket, _ in batch])
            self.ages += [self.version - group.group.samples[0].first_version for group in groups]
            await asyncio.sleep(self.random.choice((0.0, 0.1, 1.0, 3.0)))  # train and publish
            self.version += 1
            self.alive -= len(batch)
            await self.queue.release(self.groups_per_step)
        state = self.queue.state()
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        return state

    async def _feed(self, slots: asyncio.Semaphore) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                await slots.acquire()
                ticket = await self.queue.ticket()
                self.issued.append(ticket)
                self.alive += 1
                self.most_alive = max(self.most_alive, self.alive)
                tasks.create_task(self._generate(ticket, slots))

    async def _generate(self, ticket: int, slots: asyncio.Semaphore) -> None:
        version = self.version
        await asyncio.sleep(self._duration())
        slots.release()
        await self.queue.put(ticket, scored(ticket, (version,), last=self.version))

    def _duration(self) -> float:
        shape = self.seed % 4
        if shape == 0:
            return self.random.expovariate(1.0)
        if shape == 1:
            return self.random.paretovariate(0.6)  # heavy tail: the mean is infinite
        if shape == 2:
            return 100.0 if self.random.random() < 0.05 else self.random.random()
        return 1.0


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
@pytest.mark.parametrize("groups_per_step", [1, 2, 5])
@pytest.mark.parametrize("engines", [3, 10**6])
def test_no_schedule_breaks_the_bounds(staleness: int, groups_per_step: int, engines: int) -> None:
    oldest_age = 0
    for seed in range(24):
        run = Run(groups_per_step, staleness, seed, engines=engines)
        state = run.play(steps=25)
        assert all(0 <= age <= staleness for age in run.ages)
        assert run.most_alive <= (staleness + 1) * groups_per_step
        assert run.issued == list(range(len(run.issued)))
        trained = [ticket for batch in run.batches for ticket in batch]
        assert len(set(trained)) == len(trained) == 25 * groups_per_step
        assert set(trained) == set(range(state.oldest)) | state.ahead
        assert all(batch == sorted(batch) for batch in run.batches)
        oldest_age = max(oldest_age, *run.ages)
    if engines > 3:
        assert oldest_age == staleness, "the allowed staleness is never used, so the work does not overlap"


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_a_wide_window_keeps_every_engine_busy_up_to_the_bound(staleness: int) -> None:
    run = Run(4, staleness, seed=3)
    run.play(steps=10)
    assert run.most_alive == (staleness + 1) * 4


def test_without_staleness_each_step_takes_exactly_its_tickets() -> None:
    for seed in range(20):
        run = Run(3, 0, seed)
        run.play(steps=8)
        assert run.batches == [[3 * step, 3 * step + 1, 3 * step + 2] for step in range(8)]


def test_groups_overtake_a_slow_one_only_while_the_bound_allows() -> None:
    async def main() -> list[list[int]]:
        queue = TicketQueue(1, 2)
        for _ in range(3):
            await queue.ticket()
        batches = []
        for ticket in (1, 2):  # ticket 0 is slow and may be passed twice: then its age is 2
            await queue.put(ticket, scored(ticket, (0,)))
            batches.append([number for number, _ in await queue.take(1)])
            await queue.release(1)
        late = asyncio.create_task(queue.take(1))
        for _ in range(2):
            ticket = await queue.ticket()
            await queue.put(ticket, scored(ticket, (2,)))
        await asyncio.sleep(1)
        assert not late.done(), "ticket 0 was passed a third time"
        await queue.put(0, scored(0, (0,)))
        batches.append([number for number, _ in await late])
        return batches

    assert virtual_time.run(main()) == [[1], [2], [0]]


def test_finished_groups_wait_for_older_ones_whose_bound_is_near() -> None:
    """The counterexample at the top of queue.py: B = 2, S = 1; 4 and 5 are finished before 2 and 3."""

    async def main() -> list[int]:
        queue = TicketQueue(2, 1)
        for _ in range(4):
            await queue.ticket()
        for ticket in (0, 1):
            await queue.put(ticket, scored(ticket, (0,)))
        await queue.take(2)
        await queue.release(2)
        for ticket in (await queue.ticket(), await queue.ticket()):
            await queue.put(ticket, scored(ticket, (1,)))
        waiting = asyncio.create_task(queue.take(2))
        await asyncio.sleep(1)
        assert not waiting.done()
        for ticket in (2, 3):
            await queue.put(ticket, scored(ticket, (0,)))
        return [ticket for ticket, _ in await waiting]

    assert virtual_time.run(main()) == [2, 3]


@given(seed=st.integers(0, 10**6), staleness=st.integers(0, 3), killed_after=st.integers(0, 12))
def test_a_resumed_run_trains_every_prompt_once(seed: int, staleness: int, killed_after: int) -> None:
    first = Run(3, staleness, seed)
    state = first.play(steps=killed_after)
    second = Run(3, staleness, seed + 1, start=state, first_version=killed_after)
    end = second.play(steps=6)
    trained = [ticket for batch in first.batches + second.batches for ticket in batch]
    assert len(set(trained)) == len(trained)
    assert set(trained) == set(range(end.oldest)) | end.ahead
    assert all(age <= staleness for age in second.ages)


@given(st.permutations(range(12)), st.integers(1, 12))
def test_a_position_is_the_set_of_trained_tickets(order: list[int], cut: int) -> None:
    whole = Position().after(order)
    assert whole == Position(oldest=12)
    part = Position()
    for ticket in order[:cut]:
        part = part.after([ticket])
    assert set(range(part.oldest)) | part.ahead == set(order[:cut])
    assert part.oldest not in order[:cut]
    with pytest.raises(ValueError, match="trained twice"):
        part.after([order[0]])


def test_a_position_with_a_hole_below_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no position"):
        Position(oldest=3, ahead=frozenset({3}))


def test_cancelling_any_waiter_changes_nothing() -> None:
    async def main() -> list[int]:
        queue = TicketQueue(2, 0)
        assert [await queue.ticket(), await queue.ticket()] == [0, 1]
        for waiting in (asyncio.create_task(queue.ticket()), asyncio.create_task(queue.take(2))):
            await asyncio.sleep(1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await queue.put(1, scored(1, (0,)))
        await queue.put(0, scored(0, (0,)))
        batch = await queue.take(2)
        await queue.release(2)
        return [*(ticket for ticket, _ in batch), await queue.ticket()]

    assert virtual_time.run(main()) == [0, 1, 2]


@given(seed=st.integers(0, 10**6))
def test_waiters_cancelled_at_random_lose_and_double_no_ticket(seed: int) -> None:
    async def main() -> None:
        dice = random.Random(seed)
        queue = TicketQueue(2, 1)
        handed: list[int] = []

        async def feed() -> None:
            while True:
                ticket = await queue.ticket()
                handed.append(ticket)
                await queue.put(ticket, scored(ticket, (0,)))

        trained: list[int] = []
        feeder = asyncio.create_task(feed())
        for _ in range(8):
            while True:
                taking = asyncio.create_task(queue.take(2))
                await asyncio.sleep(0)
                if dice.random() < 0.5:
                    taking.cancel()
                if dice.random() < 0.5:
                    feeder.cancel()
                    await asyncio.gather(feeder, return_exceptions=True)
                    feeder = asyncio.create_task(feed())
                (result,) = await asyncio.gather(taking, return_exceptions=True)
                if isinstance(result, list):
                    trained += [ticket for ticket, _ in result]
                    break
            await queue.release(2)
        feeder.cancel()
        assert trained == list(range(16))
        assert handed == list(range(len(handed)))

    virtual_time.run(main())


def test_an_error_reaches_everybody_who_waits_and_everybody_who_comes_later() -> None:
    async def main() -> list[str]:
        queue = TicketQueue(1, 0)
        await queue.ticket()
        waiting = [asyncio.create_task(queue.ticket()), asyncio.create_task(queue.take(1))]
        await asyncio.sleep(1)
        queue.fail(RuntimeError("the engine is gone"))
        queue.fail(RuntimeError("a later error"))
        results = await asyncio.gather(*waiting, return_exceptions=True)
        for call in (queue.ticket(), queue.take(1), queue.put(0, scored(0, (0,))), queue.release(1)):
            with pytest.raises(RuntimeError, match="the engine is gone"):
                await call
        return [str(result) for result in results]

    assert virtual_time.run(main()) == ["the engine is gone"] * 2


def test_a_group_that_nobody_asked_for_is_refused() -> None:
    async def main() -> None:
        queue = TicketQueue(2, 0)
        ticket = await queue.ticket()
        await queue.put(ticket, scored(0, (0,)))
        for wrong in (ticket, 7):
            with pytest.raises(ValueError, match=f"ticket {wrong} is not waited for"):
                await queue.put(wrong, scored(0, (0,)))
        with pytest.raises(ValueError, match="release without take"):
            await queue.release(2)
        with pytest.raises(ValueError, match="takes and releases 2 groups, not 3"):
            await queue.take(3)

    virtual_time.run(main())


def test_a_step_waits_as_long_as_a_group_is_missing() -> None:
    async def main() -> None:
        queue = TicketQueue(2, 0)
        await queue.ticket()
        await queue.put(0, scored(0, (0,)))
        await queue.take(2)

    with pytest.raises(virtual_time.Deadlock):
        virtual_time.run(main())


@pytest.mark.parametrize(
    ("versions", "last", "message"),
    [
        ((5, 2, 5), 5, "prompt 'p9': sample 1 is 3 updates old at version 5; rollout.max_staleness allows 2"),
        ((5, 5, 5), 6, "prompt 'p9': a sample has version 6, the learner only 5"),
    ],
)
def test_wrong_versions_are_found_at_run_time(versions: tuple[int, ...], last: int, message: str) -> None:
    check_staleness([scored(8, (3, 4, 5), last=5)], version=5, bound=2)
    with pytest.raises(StalenessError) as caught:
        check_staleness([scored(8, (3, 4, 5), last=5), scored(9, versions, last)], version=5, bound=2)
    assert str(caught.value) == message
