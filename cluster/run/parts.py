"""Everything that one run holds, opened in order and closed in reverse whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.record.folder import RunFolder
from cluster.record.heldout import RewardsByPrompt, evaluation_record, start_rewards
from cluster.record.metrics import MetricsWriter, read_lines, step_report
from cluster.record.report import Report
from cluster.run.checkpoints import Checkpoints
from cluster.run.gap import GapGuard, Proof
from cluster.run.queue import TicketQueue
from cluster.run.signals import cancel_on_signals
from cluster.run.state import RunState
from cluster.workers.actors import RemoteReward, RemoteRollout, cause_of, is_death
from cluster.workers.fleet import Fleet, Limit, within
from cluster.workers.learner_group import LearnerGroup
from cluster.workers.placement import Cluster
from cluster.workers.transport import connect
from configs.rewards import LONGEST_GROUP_S, RewardConfig
from configs.schema import Config
from learner.objectives.build import objective_at
from learner.objectives.interface import Objective
from learner.types import RankReport, RowResult
from reward.types import ScoredGroup
from rollout.data.prompts import Order, PromptSet
from rollout.types import Group, Parameters, Prompt, Sampling
from rollout.worker import ParametersRefused

logger = logging.getLogger(__name__)

LOAD_AGAIN_AFTER_S = (1.0, 5.0)
"""Pauses before the further tries of one worker's load."""


class RunError(RuntimeError):
    """A run cannot go on. One line that names the cause and the fix."""


class Rollouts:
    """All rollout workers. A replaced worker gets the current parameters before its first prompt."""

    def __init__(self, cluster: Cluster, config: Config, workers: int, guard: GapGuard | None = None) -> None:
        """`guard` judges what `prove` finds."""
        self._cluster, self._guard = cluster, guard
        self._settings = config.rollout
        self._model = config.model
        self._transport = config.learner.transport
        self._load_limit = Limit(seconds=config.rollout.load_timeout_s, setting="rollout.load_timeout_s")
        self._current: Parameters | None = None
        self._proof: Proof | None = None
        """What workers with the current parameters must answer, as soon as the learner has said it."""
        self.fleet: Fleet[RemoteRollout] = Fleet("rollout", workers, self._spawn, is_death)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Group:
        """One group. Raises RunError where it takes longer than rollout.group_timeout_s."""
        limit = self._settings.group_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await self.fleet.run(lambda worker: worker.generate(prompt, sampling))
        except TimeoutError as error:
            raise RunError(
                f"prompt '{prompt.id}': no answer within rollout.group_timeout_s ({limit:g} s); raise it or lower"
                " rollout.max_new_tokens"
            ) from error

    async def logprobs(self, prompt: Prompt, answers: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        """[T] of each given answer at temperature 1."""
        return await self.fleet.run(lambda worker: worker.logprobs(prompt, answers))

    async def load(self, parameters: Parameters) -> dict[str, float]:
        """Make parameters live in every worker; the slowest worker's seconds by phase."""
        self._current, self._proof = parameters, None
        seconds = await self.fleet.everywhere(lambda worker: _load(worker, parameters), self._load_limit)
        return {phase: max(each[phase] for each in seconds) for phase in seconds[0]}

    async def prove(self, proof: Proof) -> None:
        """Compare every worker with the learner; one that differs is loaded again in full, once. Raises GapError."""
        assert self._guard is not None, "nobody to judge what is found"
        self._proof = proof
        faults = await self.fleet.everywhere(lambda worker: self._fault_of(worker, proof), self._load_limit)
        for number, fault in enumerate(faults):
            if fault is not None:
                self._guard.judge(number, fault, "given", proof.version, was_reloaded=self._loads_alone)
        self._guard.settle(proof.version)

    async def _fault_of(self, worker: RemoteRollout, proof: Proof) -> str | None:
        """What is wrong with a worker, also after another load where it can be loaded alone."""
        guard, parameters = self._guard, self._current
        assert guard is not None, "nobody to judge what is found"
        assert parameters is not None, "proven without parameters"

        async def ask() -> str | None:
            [answer] = await worker.logprobs(guard.question, [guard.tokens[1:]])
            return guard.fault_of(worker.seat, proof, answer)

        fault = await ask()
        if fault is None or not self._loads_alone or not guard.may_reload or guard.is_known(worker.seat):
            return fault
        guard.reloading(fault)
        await _load(worker, parameters)
        return await ask()

    @property
    def _loads_alone(self) -> bool:
        """Whether one worker can be loaded without the learner and all others."""
        return self._transport == "shared_memory"

    async def _spawn(self, number: int) -> RemoteRollout:
        if self._current is not None and not self._loads_alone:
            raise RunError(
                f"rollout worker {number} died, and learner.transport '{self._transport}' cannot take a new one"
                " into its group; go on with `grao resume`"
            )
        worker = self._cluster.rollout(number, self._model)
        limit = self._settings.start_timeout_s
        try:
            async with asyncio.timeout(limit):
                await worker.start()
        except TimeoutError as error:
            worker.end()
            raise RunError(
                f"rollout worker {number} did not start within rollout.start_timeout_s ({limit:g} s)"
            ) from error
        if self._current is not None:
            try:
                await within(self._load_limit, self._bring_up(worker, self._current))
            except BaseException:
                worker.end()
                raise
        return worker

    async def _bring_up(self, worker: RemoteRollout, parameters: Parameters) -> None:
        """A replacement gets the current parameters, and proves them if the others have done so already."""
        await _load(worker, parameters)
        proof = self._proof
        if proof is not None and (fault := await self._fault_of(worker, proof)) is not None:
            assert self._guard is not None
            self._guard.judge(worker.seat, fault, "given", proof.version, was_reloaded=True)


async def _load(worker: RemoteRollout, parameters: Parameters) -> dict[str, float]:
    """Load one worker. A version that it refused, as after one cut connection, is fetched again: the old one stayed
    live, so another try is harmless. Raises the last refusal."""
    for pause in LOAD_AGAIN_AFTER_S:
        try:
            return await worker.load(parameters)
        except Exception as error:
            if not isinstance(cause_of(error), ParametersRefused):
                raise
            logger.warning("loaded again in %g s: %s", pause, cause_of(error))
            await asyncio.sleep(pause)
    return await worker.load(parameters)


class Rewards:
    """All reward workers, and the scoring actors that they share."""

    def __init__(self, cluster: Cluster, workers: int, settings: RewardConfig | None = None) -> None:
        self._cluster = cluster
        seconds = LONGEST_GROUP_S if settings is None else settings.group_timeout_s
        self._limit = Limit(seconds=seconds, setting="reward.group_timeout_s")
        self._scoring = cluster.scoring()
        self.fleet: Fleet[RemoteReward] = Fleet("reward", workers, self._spawn, is_death)

    async def score(self, group: Group) -> ScoredGroup:
        return await self.fleet.run(lambda worker: worker.score(group), self._limit)

    async def counts(self) -> dict[str, float]:
        """What all living workers have counted since they started, by metric name."""
        found = await self.fleet.everywhere(lambda worker: worker.counts(), self._limit)
        return {f"reward_calls/{name}": float(sum(one[name] for one in found)) for name in (found[0] if found else ())}

    async def _spawn(self, number: int) -> RemoteReward:
        worker = self._cluster.reward(number, self._scoring)
        await worker.start()
        return worker


async def answer(
    rollouts: Rollouts, rewards: Rewards, prompts: Sequence[Prompt], sampling: Sampling
) -> list[ScoredGroup]:
    """Every prompt, answered and scored."""

    async def one(prompt: Prompt) -> ScoredGroup:
        return await rewards.score(await rollouts.generate(prompt, sampling))

    async with asyncio.TaskGroup() as tasks:
        found = [tasks.create_task(one(prompt)) for prompt in prompts]
    return [task.result() for task in found]


@dataclass(slots=True, kw_only=True)
class Run:
    """The parts of a living run."""

    config: Config
    folder: RunFolder
    checkpoints: Checkpoints
    prompts: PromptSet
    order: Order
    state: RunState
    """Where training starts."""
    queue: TicketQueue
    rollouts: Rollouts
    rewards: Rewards
    learner: LearnerGroup
    objective: Objective
    metrics: MetricsWriter
    report: Report
    start_rewards: RewardsByPrompt | None
    """Of the held-out answers before the first update; None until they are there."""
    guard: GapGuard
    unproven: Proof | None = None
    """What the workers are still to be compared with."""

    async def make_live(self, version: int, prove: bool = True) -> dict[str, float]:
        """Publish the learner's parameters as `version` and load them in every rollout worker, if there is any.

        With `prove` all workers are compared with the learner before anything is sampled; else the next update does it
        at the same time. Returns the slowest worker's seconds by phase. Raises GapError.
        """
        if not self.rollouts.fleet.size:
            return {}
        await self.prove()
        parameters = await self.learner.publish(version)
        async with asyncio.TaskGroup() as both:  # a collective transport needs both ends at the same time
            sending = both.create_task(self._send(parameters))
            loading = both.create_task(self.rollouts.load(parameters))
        self.unproven, began = sending.result(), time.monotonic()
        if prove:
            await self.prove()
        return {**loading.result(), "prove": time.monotonic() - began}

    async def update(self, step: int, groups: Sequence[ScoredGroup]) -> list[RankReport]:
        """Step number `step` of the learner. Raises GapError where a worker does not compute what the learner does."""
        async with asyncio.TaskGroup() as both:
            training = both.create_task(self.learner.train_step(step, groups))
            both.create_task(self.prove())
        return training.result()

    async def prove(self) -> None:
        """Compare the workers with the learner, unless that was done. Raises GapError."""
        proof, self.unproven = self.unproven, None
        if proof is not None:
            await self.rollouts.prove(proof)

    async def _send(self, parameters: Parameters) -> Proof:
        """Take part in the transfer, then say what an engine with these parameters must answer."""
        await self.learner.send(parameters)
        [logprobs] = await self.learner.logprobs([self.guard.tokens])
        return Proof(version=parameters.version, updates=self.learner.updates, logprobs=logprobs)

    def is_due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def look_at_samples(
        self, step: int, groups: Sequence[ScoredGroup], reports: Sequence[RankReport]
    ) -> dict[str, float]:
        """By worker, how far what it sampled for step number `step` is from the learner; metrics. Raises GapError."""
        rows = objective_at(step, self.config.learner, self.config.rollout).rows(groups)
        return self.guard.look_at_samples(step - 1, groups, rows, reports)

    async def log_step(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        reports: Sequence[RankReport],
        seconds: Mapping[str, float],
        more: Mapping[str, float],
    ) -> None:
        """Record one update everywhere it is shown; `more` are further metrics."""
        report = step_report(
            step, groups, reports, objective_at(step, self.config.learner, self.config.rollout), seconds
        )
        report = replace(report, metrics={**report.metrics, **more, **await self.rewards.counts()})
        self.metrics.step(report)
        if self.config.run.write_samples and groups[0].group.samples:
            self.metrics.samples(step, groups, self.objective)
        self.report.step(report)

    def log_evaluation(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        judged: Mapping[int, RowResult] | None,
        log_ratios: Sequence[Sequence[float]] | None,
    ) -> None:
        """Record one evaluation everywhere it is shown; `judged` are the results of an objective without samples."""
        by_objective = None if judged is None else (self.objective, judged)
        record = evaluation_record(step, groups, self.start_rewards, log_ratios, by_objective)
        self.start_rewards = self.start_rewards or start_rewards([record])
        self.metrics.evaluation(step, record)
        self.report.evaluation(record)


@contextlib.asynccontextmanager
async def open_run(
    config: Config, folder: RunFolder, checkpoints: Checkpoints, prompts: PromptSet, state: RunState, report: Report
) -> AsyncIterator[Run]:
    """Start Ray, engines, rewards and ranks, restore the learner; end all of them on the way out."""
    async with contextlib.AsyncExitStack() as stack:
        report.phase("starting Ray")
        cluster = await stack.enter_async_context(Cluster(config, say=report.note))
        cancel_on_signals()
        guard = GapGuard(config, prompts.train, state.gap, report.note)
        rollouts = Rollouts(cluster, config, config.rollout_workers, guard)
        rewards = Rewards(cluster, config.reward_workers, config.reward)
        learner = LearnerGroup(cluster.rank, config.learner.ranks, secrets.token_hex(16), config.learner.step_timeout_s)
        stack.push_async_callback(_close, rollouts, rewards, learner)
        report.phase(f"starting {_count(config)} ({cluster.describe()})")
        for line in cluster.map():
            report.note(line)
        async with asyncio.TaskGroup() as starting:
            starting.create_task(rollouts.fleet.start())
            starting.create_task(rewards.fleet.start())
            starting.create_task(_start_learner(learner, cluster.nodes == 1, checkpoints, state))
        if learner.note:
            report.note(learner.note)
        await connect(config, rollouts.fleet, learner)
        metrics = MetricsWriter(folder)
        stack.callback(metrics.close)
        position = state.position
        yield Run(
            config=config,
            folder=folder,
            checkpoints=checkpoints,
            prompts=prompts,
            order=prompts.order(config.run.seed, config.data.shuffle),
            state=state,
            queue=TicketQueue(
                config.learner.groups_per_step, config.rollout.max_staleness, position.oldest, position.ahead
            ),
            rollouts=rollouts,
            rewards=rewards,
            learner=learner,
            objective=objective_at(1, config.learner, config.rollout),
            metrics=metrics,
            report=report,
            start_rewards=start_rewards(read_lines(folder.evaluations)),
            guard=guard,
        )


async def _start_learner(learner: LearnerGroup, one_node: bool, checkpoints: Checkpoints, state: RunState) -> None:
    await learner.start(one_node)
    if state.step:
        await learner.load(str(checkpoints.path_of(state.step)))


async def _close(rollouts: Rollouts, rewards: Rewards, learner: LearnerGroup) -> None:
    await asyncio.gather(rollouts.fleet.close(), rewards.fleet.close(), learner.close())


def _count(config: Config) -> str:
    counts = (
        (config.rollout_workers, "rollout worker"),
        (config.reward_workers, "reward worker"),
        (config.learner.ranks, "learner rank"),
    )
    return ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts if count)
