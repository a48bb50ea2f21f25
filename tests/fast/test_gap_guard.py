"""The proof that engines and learner are the same function: limits and statistics, and what follows from a fault.

Engines and learner are of the test: a worker's log-probabilities are those of the version that it really holds.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.run.gap import (
    BOUNDS,
    MOST_GIVEN,
    Gap,
    GapError,
    GapGuard,
    Measured,
    Proof,
    gap_between,
    gap_of_rows,
    given_tokens,
)
from cluster.run.parts import Rollouts, Run
from configs.load import parse
from configs.schema import Config
from learner.types import RankReport, Row
from reward.types import ScoredGroup
from rollout.types import Group, Prompt, Sample
from tests.fast.virtual_time import run
from tests.learner_cases import row_result
from tests.reward_groups import prompt

PROMPTS = [replace(prompt(id=f"p{n}"), token_ids=tuple(range(3, 40)), reference_ids=tuple(range(40))) for n in range(9)]
ROUNDING = {"float32": 2e-7, "bfloat16": 4e-3}


def config(dtype: str = "float32", guard: str = "stop", learner: str | None = None, **rollout: Any) -> Config:
    tree = {
        "model": {"path": "m"},
        "data": {"train": "x"},
        "run": {"folder": "r", "gap_guard": guard},
        "rollout": {"dtype": dtype, "temperature": 1.0, **rollout},
        "learner": {"dtype": learner or dtype},
        "reward": {"rewards": [{"kind": "numeric"}]},
    }
    return parse(tree)


def logprobs(version: int, tokens: int, dtype: str, who: int, step: float = 0.5) -> tuple[float, ...]:
    """Of one model at one version, with the rounding of whoever computes them."""
    true = np.random.default_rng(0).normal(-3, 1, tokens) + step * version * np.random.default_rng(1).normal(
        size=tokens
    )
    noise = np.random.default_rng([version, who]).normal(0, ROUNDING[dtype] * math.sqrt(math.pi / 2), tokens)
    return tuple((true + noise).tolist())


@dataclass
class Worker:
    """An engine that holds a version. `faulty` loads nothing, that many times; a replacement is a new one."""

    seat: int
    dtype: str = "float32"
    faulty: int = 0
    apart: float = 0.0
    """Nats by which its log-probabilities are wrong, whatever it holds."""
    step: float = 0.5
    holds: int = 0
    loads: int = 0
    ended: bool = False
    asked: list[int] = field(default_factory=list)

    async def start(self) -> None: ...

    async def load(self, parameters: Any) -> dict[str, float]:
        self.loads += 1
        if self.faulty:
            self.faulty -= 1
        else:
            self.holds = parameters.version
        return {"load": 1.0}

    async def logprobs(self, question: Prompt, answers: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        self.asked.append(self.holds)
        found = logprobs(self.holds, len(answers[0]), self.dtype, self.seat + 1, self.step)
        return [tuple(one + self.apart for one in found)]

    async def close(self) -> None: ...

    def end(self) -> None:
        self.ended = True


@dataclass
class Version:
    version: int


class Learner:
    """The learner of a run as `make_live` needs it; every version is one update after the last."""

    def __init__(self, dtype: str, step: float = 0.5) -> None:
        self.dtype, self.step, self.updates, self.version = dtype, step, 0, 0

    async def publish(self, version: int) -> Version:
        self.updates += version > 0
        self.version = version
        return Version(version)

    async def send(self, parameters: Version) -> None: ...

    async def logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[tuple[float, ...]]:
        return [logprobs(self.version, len(tokens) - 1, self.dtype, 0, self.step) for tokens in sequences]

    async def train_step(self, step: int, groups: object) -> list[RankReport]:
        return []


class Cluster:
    def __init__(self, workers: Sequence[Worker]) -> None:
        self.waiting, self.made = list(workers), list[Worker]()

    def rollout(self, number: int, model: object) -> Worker:
        self.made.append(self.waiting.pop(0))
        return self.made[-1]


class Living:
    """A run of which only the guard, its engines and its learner are there."""

    def __init__(self, settings: Config, *workers: Worker, step: float = 0.5, measured: Measured | None = None) -> None:
        self.said: list[str] = []
        self.workers = workers
        self.guard = GapGuard(settings, PROMPTS, measured, self.said.append)
        self.cluster = Cluster(workers)
        self.count = len({worker.seat for worker in workers})
        self.rollouts = Rollouts(self.cluster, settings, self.count, self.guard)  # type: ignore[arg-type]
        self.learner = Learner(settings.learner.dtype, step)
        parts: dict[str, Any] = dict.fromkeys(
            ("folder", "checkpoints", "prompts", "order", "state", "queue", "rewards", "objective", "metrics", "report")
        )
        self.run = Run(
            config=settings, rollouts=self.rollouts, learner=self.learner, start_rewards=None, guard=self.guard, **parts
        )  # type: ignore[arg-type]

    def live(self, versions: Sequence[int], prove: bool = True, before: dict[int, Any] | None = None) -> Living:
        """Make the versions live, one after the other; `before` some of them something happens."""

        async def all_of_them() -> None:
            if not self.cluster.made:
                await self.rollouts.fleet.start()
            for version in versions:
                if before is not None and version in before:
                    before[version]()
                await self.run.make_live(version, prove)

        run(all_of_them())
        return self


def broken(worker: Worker, times: int = 99) -> dict[int, Any]:
    return {3: lambda: setattr(worker, "faulty", times)}


# --------------------------------------------------------------------------- numbers


def test_the_gap_is_a_mean_with_its_standard_error() -> None:
    found = gap_between((-1.0, -2.0, -3.0), (-1.5, -2.0, -2.0))
    assert found.mean == pytest.approx(0.5)
    assert found.error == pytest.approx(np.std([0.5, 0.0, 1.0], ddof=1) / math.sqrt(3))
    assert found.tokens == 3
    rows = gap_of_rows([1.0, 3.0], [10, 10])
    assert (rows.mean, rows.tokens) == (pytest.approx(0.2), 20)
    assert rows.error == pytest.approx(np.std([0.1, 0.3], ddof=1) / math.sqrt(2))
    assert math.isinf(gap_of_rows([1.0], [10]).error), "one row alone proves nothing"
    assert not gap_between((-9.0,), (-1.0,)).is_beyond(1e-3), "nor does one token"


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_beyond_every_limit(wrong: float) -> None:
    assert gap_between((-1.0, wrong, -1.0), (-1.0, -1.0, -1.0)).is_beyond(1e9)
    assert gap_of_rows([0.1, abs(wrong)], [3, 4]).is_beyond(1e9)


def test_few_tokens_of_a_mixture_of_experts_do_not_stop_a_run() -> None:
    """One token in a hundred is nats away, as where a router's near tie falls differently: no limit is passed."""
    draw = np.random.default_rng(3)
    for _ in range(200):
        learner = draw.normal(-2, 1, 255)
        engine = learner + draw.normal(0, 0.01, 255) + np.where(draw.random(255) < 0.01, draw.normal(0, 2, 255), 0)
        assert not gap_between(engine.tolist(), learner.tolist()).is_beyond(0.04)
        far = learner + draw.normal(0, 0.1, 255)
        assert gap_between(far.tolist(), learner.tolist()).is_beyond(0.04)


def test_given_tokens_are_of_many_prompts_and_fit_an_engine() -> None:
    found = given_tokens(PROMPTS, config())
    assert len(found) == MOST_GIVEN
    assert found[:64] == PROMPTS[0].token_ids[-32:] + PROMPTS[0].reference_ids[:32]
    assert given_tokens(PROMPTS[:1], config()) == found[:64]
    assert len(given_tokens(PROMPTS, config(max_new_tokens=6))) == 64, "small steps stay cheap"
    short = config()
    short = short.model_copy(update={"data": short.data.model_copy(update={"max_prompt_tokens": 40})})
    short = short.model_copy(update={"data": short.data.model_copy(update={"max_reference_tokens": 40})})
    short = short.model_copy(update={"rollout": short.rollout.model_copy(update={"max_new_tokens": 9})})
    assert len(given_tokens(PROMPTS * 9, short)) == 64
    short = short.model_copy(update={"data": short.data.model_copy(update={"max_reference_tokens": 9})})
    assert len(given_tokens(PROMPTS, short)) == 48, "an engine makes one token more"


# --------------------------------------------------------------------------- given tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_healthy_workers_are_left_in_peace(dtype: str) -> None:
    living = Living(config(dtype), Worker(0, dtype), Worker(1, dtype)).live(range(8))
    assert living.said == []
    assert [worker.loads for worker in living.workers] == [8, 8]
    assert living.guard.measured is not None
    assert living.guard.measured.mean == pytest.approx(ROUNDING[dtype] * math.sqrt(2), rel=0.2)


def test_a_worker_that_missed_a_version_is_loaded_again_once_and_is_well() -> None:
    worker = Worker(1)
    living = Living(config(), Worker(0), worker).live(range(5), before=broken(worker, times=1))
    assert len(living.said) == 1
    assert living.said[0].startswith("rollout worker 1 at version 3: its log-probabilities are 0.")
    assert living.said[0].endswith("the limit is 2e-06 (of float32); it is loaded again in full")
    assert (living.workers[0].loads, worker.loads, living.guard.reloads) == (5, 6, 1)


def test_a_worker_that_stays_behind_stops_the_run_in_one_line() -> None:
    worker = Worker(1)
    with pytest.raises(GapError) as caught:
        Living(config(), Worker(0), worker).live(range(5), before=broken(worker))
    line = str(caught.value)
    assert "\n" not in line
    for part in (
        "rollout worker 1 at version 3: its log-probabilities are 0.",
        "nats per token away from the learner's on 255 given tokens",
        "the limit is 2e-06 (of float32)",
        "also after it was loaded again in full",
        "run.gap_guard: warn",
    ):
        assert part in line, line
    assert worker.loads == 5, "versions 0 to 3, and once more"


def test_a_worker_that_is_apart_from_the_first_version_on_stops_the_run_at_once() -> None:
    worker = Worker(0, apart=0.1)
    with pytest.raises(GapError, match=r"worker 0 at version 0: .* 0\.1 nats .* limit is 0\.02 .* first version"):
        Living(config(), worker).live([0])
    assert worker.loads == 1


def test_told_to_warn_the_run_goes_on_and_says_so_once_until_the_worker_is_well() -> None:
    worker = Worker(1)
    heal = {**broken(worker), 6: lambda: setattr(worker, "faulty", 0), 7: lambda: setattr(worker, "faulty", 99)}
    living = Living(config(guard="warn"), Worker(0), worker).live(range(9), before=heal)
    assert [line.split(":")[0] for line in living.said] == [
        "rollout worker 1 at version 3",  # loaded again
        "rollout worker 1 at version 3",  # going on
        "rollout worker 1 at version 7",
        "rollout worker 1 at version 7",
    ]
    assert living.said[1].endswith("going on because of run.gap_guard: warn")
    first = Living(config(guard="warn"), Worker(0, apart=0.1)).live(range(3))
    assert len(first.said) == 1


def test_updates_below_the_rounding_of_bfloat16_are_missed_to_the_last_bit() -> None:
    """The gap says nothing at all here; that the engine's answer is the old one says everything."""
    worker = Worker(1, "bfloat16", step=1e-4)
    with pytest.raises(GapError, match=r"worker 1 at version 3: .* those of version 2 to the last bit on 255"):
        Living(config("bfloat16"), Worker(0, "bfloat16", step=1e-4), worker, step=1e-4).live(
            range(5), before=broken(worker)
        )
    healthy = Living(config("bfloat16"), Worker(0, "bfloat16", step=1e-4), step=1e-4).live(range(9))
    assert healthy.said == []


def test_an_answer_that_stays_is_no_fault_where_nothing_was_learnt() -> None:
    answer, (before, after) = (
        logprobs(0, 255, "bfloat16", 1, 1e-4),
        (logprobs(version, 255, "bfloat16", 0, 1e-4) for version in (2, 3)),
    )

    def fault_after(proof: Proof, settings: Config) -> str | None:
        guard = GapGuard(settings, PROMPTS, Measured(dtype="bfloat16", mean=4e-3), print)
        assert guard.fault_of(0, Proof(version=2, updates=2, logprobs=before), answer) is None
        return guard.fault_of(0, proof, answer)

    both = config("bfloat16")
    assert fault_after(Proof(version=3, updates=3, logprobs=after), both) is not None
    assert fault_after(Proof(version=3, updates=2, logprobs=after), both) is None, "a step without signal"
    assert fault_after(Proof(version=3, updates=3, logprobs=before), both) is None, "the learner has not moved either"
    mixed = config("bfloat16", learner="float32")
    assert fault_after(Proof(version=3, updates=3, logprobs=after), mixed) is None, "its copy may not have moved yet"


def test_a_replacement_proves_the_current_version_before_it_samples() -> None:
    settings, new = config(), Worker(1, faulty=99)
    living = Living(settings, Worker(0), Worker(1), new)

    async def lose_one() -> None:
        await living.rollouts.fleet.start()
        for version in range(3):
            await living.run.make_live(version)
        living.cluster.made[1].end()
        await living.rollouts.fleet._replace(living.rollouts.fleet._seats[1], living.cluster.made[1], OSError("gone"))  # type: ignore[arg-type]

    with pytest.raises(GapError, match=r"worker 1 at version 2: .* also after it was loaded again in full"):
        run(lose_one())
    assert new.loads == 2
    assert new.asked == [0, 0]


def test_what_was_measured_before_an_interruption_still_holds() -> None:
    measured = Measured(dtype="bfloat16", mean=2e-2)
    guard = GapGuard(config("bfloat16"), PROMPTS, measured, print)
    assert guard.limit == pytest.approx(8e-2)
    assert guard.may_reload
    other = GapGuard(config("float32"), PROMPTS, measured, print)
    assert other.measured is None, "another type than then"
    assert other.limit == BOUNDS["float32"].ceiling
    worker = Worker(0)
    living = Living(config(), worker, measured=Measured(dtype="float32", mean=1e-6))
    with pytest.raises(GapError, match=r"version 7: .* also after it was loaded again in full"):
        living.live([7], before={7: lambda: setattr(worker, "faulty", 99)})


def test_with_staleness_the_proof_runs_beside_the_update() -> None:
    """`make_live` does not wait for it, the next update does, or else the next version."""
    worker = Worker(0)
    living = Living(config(max_staleness=1), worker)

    async def versions(updates: bool) -> None:
        await living.rollouts.fleet.start()
        await living.run.make_live(0)
        worker.faulty = 99
        await living.run.make_live(1, prove=False)
        assert worker.asked == [0]
        await (living.run.update(2, []) if updates else living.run.make_live(2, prove=False))

    for updates in (True, False):
        worker = Worker(0)
        living = Living(config(max_staleness=1), worker)
        with pytest.raises((GapError, ExceptionGroup)) as caught:
            run(versions(updates))
        error = caught.value.exceptions[0] if isinstance(caught.value, ExceptionGroup) else caught.value
        assert isinstance(error, GapError)
        assert "at version 1" in str(error)


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_where_no_worker_can_be_loaded_alone_the_next_version_is_its_second_chance(transport: str) -> None:
    settings, worker = config(), Worker(0)
    settings = settings.model_copy(update={"learner": settings.learner.model_copy(update={"transport": transport})})
    well = Living(settings, worker).live(range(6), before=broken(worker, times=1))
    assert [line.rpartition("; ")[2] for line in well.said] == ["it is loaded again in full with version 4"]
    assert worker.loads == 6
    worker = Worker(0)
    with pytest.raises(GapError, match=r"at version 4: .* also after it was loaded again in full"):
        Living(settings, worker).live(range(6), before=broken(worker))


# --------------------------------------------------------------------------- sampled tokens


def sampled(worker: int, first: int, last: int | None = None, samples: int = 4, tokens: int = 10) -> ScoredGroup:
    one = Sample(
        token_ids=(7,) * tokens,
        logprobs=(-1.0,) * tokens,
        first_version=first,
        last_version=first if last is None else last,
        finish="stop",
        text="",
    )
    group = Group(prompt=prompt(), samples=(one,) * samples, worker=worker)
    return ScoredGroup(group=group, rewards=(0.0,) * samples, reference_reward=0.0, breakdown={})


def reported(groups: Sequence[ScoredGroup], gaps: Sequence[float]) -> tuple[list[Row], list[RankReport]]:
    """All samples as rows, and the ranks' answers: the mean gap of every group's rows, with a little spread."""
    draw, rows, found = random.Random(0), [], []
    for number, (scored, gap) in enumerate(zip(groups, gaps, strict=True)):
        for sample in scored.group.samples:
            row = Row(group=number, kind="sample", token_ids=sample.token_ids, logprobs=sample.logprobs, weight=1.0)
            total = gap * len(sample.token_ids) * draw.uniform(0.8, 1.2)
            found.append(row_result(len(rows), gap_sum=total))
            rows.append(row)
    reference = Row(group=0, kind="reference", token_ids=(1, 2), logprobs=None, weight=1.0)
    report = RankReport(
        rank=0,
        rows=(*found, row_result(len(rows))),
        critic=None,
        grad_norm=1.0,
        learning_rate=1.0,
        unique_tokens=0,
        nominal_tokens=0,
        micro_batches=1,
        seconds={},
    )
    return [*rows, reference], [report]


def judged(guard: GapGuard, version: int, groups: Sequence[ScoredGroup], gaps: Sequence[float]) -> dict[str, float]:
    return guard.look_at_samples(version, groups, *reported(groups, gaps))


def test_samples_are_judged_by_worker_and_only_those_of_the_current_version() -> None:
    living = Living(config(), Worker(0), Worker(1)).live(range(4))
    groups = [sampled(0, 3), sampled(1, 3), sampled(0, 2), sampled(1, 2, last=3)]
    found = judged(living.guard, 3, groups, [1e-6, 2e-6, 0.5, 0.5])
    assert found["gap/worker_0/sampled"] == pytest.approx(1e-6, rel=0.2)
    assert found["gap/worker_1/sampled"] == pytest.approx(2e-6, rel=0.2)
    assert found["gap/worker_0/given"] == pytest.approx(ROUNDING["float32"] * math.sqrt(2), rel=0.3)
    assert found["gap/limit"] == pytest.approx(2e-6)
    assert found["gap/reloads"] == 0
    assert living.said == []
    documented = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in found:
        assert f"| `{re.sub(r'worker_[0-9]+', 'worker_N', name)}` |" in documented


def test_a_wrong_temperature_stops_the_run_after_the_first_step() -> None:
    living = Living(config(temperature=0.5), Worker(0), Worker(1)).live([0])
    assert judged(living.guard, 0, [sampled(0, 0)], [3e-6])["gap/worker_0/sampled"] > living.guard.limit
    with pytest.raises(
        GapError,
        match=r"worker 1 at version 0: .* 0\.2\d* nats .* 40 tokens that it sampled; the limit is 4e-06 .* first",
    ):
        judged(living.guard, 0, [sampled(0, 0), sampled(1, 0)], [1e-6, 0.25])


def test_a_temperature_that_goes_wrong_later_has_one_more_version_and_then_stops_the_run() -> None:
    living = Living(config(), Worker(0), Worker(1)).live(range(3))
    judged(living.guard, 2, [sampled(1, 2)], [0.25])
    assert [line.rpartition("; ")[2] for line in living.said] == ["it is loaded again in full with version 3"]
    living.live([3])
    judged(living.guard, 3, [sampled(0, 3)], [1e-6])  # nothing of worker 1
    with pytest.raises(GapError, match=r"worker 1 at version 3: .* also after it was loaded again in full"):
        judged(living.guard, 3, [sampled(1, 3)], [0.25])
    judged(living.guard, 3, [sampled(1, 3)], [1e-6])
    judged(living.guard, 3, [sampled(1, 3)], [0.25])  # it was well in between
    assert len(living.said) == 2


def test_truncated_sampling_and_runs_without_engines_are_not_judged() -> None:
    living = Living(config(top_p=0.9), Worker(0)).live(range(2))
    assert judged(living.guard, 1, [sampled(0, 1)], [0.5])["gap/worker_0/sampled"] > 0.3
    assert living.said == []
    assert judged(Living(config()).guard, 1, [sampled(0, 1)], [0.5]) == {}


def test_a_gap_is_beyond_a_limit_by_three_standard_errors_only() -> None:
    assert not Gap(mean=1.0, error=0.2, tokens=9).is_beyond(0.5)
    assert Gap(mean=1.0, error=0.1, tokens=9).is_beyond(0.5)
