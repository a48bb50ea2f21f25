"""The loop of a run. Two tasks, one queue between them:

    feed        takes a ticket (waits while the window is full), samples and scores that prompt's group, puts it
    train       takes the groups of a step (waits for feed), updates, makes the parameters live everywhere,
                releases the tickets (which lets feed go on)

Synchronous training is max_staleness = 0 of this same loop. See cluster/run/queue.py for what bounds the staleness.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace

from cluster.record.heldout import heldout_sampling
from cluster.run.parts import Run, answer
from cluster.run.queue import check_staleness
from cluster.run.state import RunState
from reward.types import ScoredGroup
from rollout.types import Group, Prompt, Sampling


async def train(run: Run) -> None:
    """Train from the run's state to the last step, then evaluate, save and export. Raises the first failure."""
    learner = run.config.learner
    state = run.state
    await run.make_live(state.step)
    if state.step == 0:
        await evaluate(run, state.step)
    async with asyncio.TaskGroup() as tasks:
        feeding = tasks.create_task(feed(run))
        while state.step < learner.steps:
            clock = Clock()
            with clock.phase("wait"):
                taken = await run.queue.take(learner.groups_per_step)
            groups = [group for _, group in taken]
            check_staleness(groups, state.step, run.config.rollout.max_staleness)
            with clock.phase("train"):
                reports = await run.update(state.step + 1, groups)
            gaps = run.look_at_samples(state.step + 1, groups, reports)
            state = state.after(ticket for ticket, _ in taken)
            evaluates = run.is_due(run.config.run.evaluate_every, state.step) or state.step == learner.steps
            if learner.objective.online or evaluates:
                with clock.phase("sync"):
                    # with staleness 0 everybody waits for the engines anyway; else nobody does
                    at_once = evaluates or run.config.rollout.max_staleness == 0
                    phases = await run.make_live(state.step, prove=at_once)
                clock.seconds |= {f"sync_{phase}": seconds for phase, seconds in phases.items()}
            if evaluates:
                with clock.phase("evaluate"):
                    await evaluate(run, state.step)
            await run.queue.release(len(groups))
            await run.log_step(state.step, groups, reports, clock.seconds, gaps)
            if run.is_due(run.config.run.checkpoint_every, state.step) or state.step == learner.steps:
                await save(run, replace(state, gap=run.guard.measured))
        feeding.cancel()
    await export(run)


async def feed(run: Run) -> None:
    """Keep one task per ticket sampling and scoring. Ends only when it is cancelled."""
    async with asyncio.TaskGroup() as groups:
        while True:
            ticket = await run.queue.ticket()
            groups.create_task(produce(run, ticket))


async def produce(run: Run, ticket: int) -> None:
    """The group of one ticket, sampled and scored where the objective needs that, into the queue."""
    rollout = run.config.rollout
    prompt = run.prompts.train[run.order.at(ticket)]
    if not run.config.learner.objective.online:
        await run.queue.put(ticket, without_samples(prompt))
        return
    sampling = Sampling(
        samples=rollout.samples_per_prompt,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_new_tokens=rollout.max_new_tokens,
        stop=rollout.stop,
        seed=seed_of(run.config.run.seed, ticket),
    )
    await run.queue.put(ticket, await sample_and_score(run, prompt, sampling))


async def sample_and_score(run: Run, prompt: Prompt, sampling: Sampling) -> ScoredGroup:
    return await run.rewards.score(await run.rollouts.generate(prompt, sampling))


def without_samples(prompt: Prompt) -> ScoredGroup:
    return ScoredGroup(group=Group(prompt=prompt, samples=()), rewards=(), reference_reward=math.nan, breakdown={})


async def evaluate(run: Run, step: int) -> None:
    """Answer the held-out prompts, score and record them. Does nothing for a run without held-out prompts.

    An objective without samples is itself measured on them, and they are answered only where the config asks for it.
    """
    if not run.prompts.heldout:
        return
    config = run.config
    if config.needs_samples:
        groups = await answer(run.rollouts, run.rewards, run.prompts.heldout, heldout_sampling(config))
    else:
        groups = [without_samples(prompt) for prompt in run.prompts.heldout]
    judged = None if config.learner.objective.online else await run.learner.measure(groups)
    compares = config.needs_samples and config.learner.keeps_start_model
    run.log_evaluation(step, groups, judged, await run.learner.log_ratios(groups) if compares else None)


async def save(run: Run, state: RunState) -> None:
    """A checkpoint that is there as a whole or not at all."""
    draft = run.checkpoints.begin(state.step)
    try:
        await run.learner.save(str(draft))
        state.save(draft)
        await asyncio.to_thread(run.checkpoints.commit, state.step)
    except BaseException:
        run.checkpoints.abandon(state.step)
        raise


async def export(run: Run) -> None:
    """The trained model as a Hugging Face folder; an older export of the run stays until the new one is whole."""
    draft = await asyncio.to_thread(run.folder.draft_model)
    await run.learner.export(str(draft))
    await asyncio.to_thread(run.folder.publish_model, draft)


def seed_of(run_seed: int, ticket: int) -> int:
    """The seed of a ticket's group: the same in every run with this run seed, unrelated between neighbours."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{ticket}".encode()).digest()[:7], "little")


class Clock:
    """Wall seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
