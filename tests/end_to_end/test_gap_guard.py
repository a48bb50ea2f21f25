"""Engines that are not what the learner is: noticed within two steps, by the run itself, with real parts.

All faults in one living run each: small float32 models at a learning rate as for a large model, and a mixture of
experts in bfloat16.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.errors import first_cause
from cluster.record.folder import RunFolder
from cluster.record.report import Report
from cluster.run.checkpoints import Checkpoints
from cluster.run.driver import sample_and_score, seed_of, train
from cluster.run.gap import GapError, GapGuard
from cluster.run.parts import Run, open_run
from cluster.run.session import fresh_state, preflight
from cluster.workers import placement
from configs.load import parse
from rollout.types import Sampling
from tests import tiny
from tests.end_to_end import faulty
from tests.end_to_end.faulty import LEFT_OUT, NOTHING, OLD, OLD_ONCE, SWAPPED, TEMPERATURE
from tests.end_to_end.harness import config, write_rows


class Faults:
    """A living run whose parts can be told to go wrong, step by step as cluster/run/driver.py does it."""

    def __init__(self, run: Run, file: Path, said: list[str]) -> None:
        self.run, self.said, self._file, self._version = run, said, file, 0
        self.gaps: dict[str, float] = {}

    async def first(self) -> None:
        """Begin with the first version."""
        self.forget()
        await self.run.make_live(self._version)

    def forget(self) -> None:
        """Whatever was before: a run that nobody has looked at."""
        self.said.clear()
        self.run.guard = GapGuard(self.run.config, self.run.prompts.train, None, self.said.append)
        self.run.rollouts._guard = self.run.guard

    def set(self, fault: str) -> None:
        self._file.write_text(fault)

    async def step(self) -> None:
        run, version = self.run, self._version
        sampling = Sampling(samples=4, temperature=0.7, top_p=1.0, max_new_tokens=12, stop=(), seed=seed_of(0, version))
        prompts = run.prompts.train[4 * version % 28 :][:4]
        groups = await asyncio.gather(*(sample_and_score(run, prompt, sampling) for prompt in prompts))
        self._version += 1
        reports = await run.update(self._version, groups)
        self.gaps = run.look_at_samples(self._version, groups, reports)
        await run.make_live(self._version)

    async def noticed(self, fault: str) -> str:
        """The line with which the run stops, within two steps."""
        self.set(fault)
        try:
            await self.step()
            await self.step()
        except (GapError, ExceptionGroup) as error:
            cause = first_cause(error)
            assert isinstance(cause, GapError)
            return str(cause)
        finally:
            self.set("")
        raise AssertionError(f"{fault}: nobody noticed")

    async def heal(self) -> None:
        """The next version arrives everywhere, and everything is well."""
        await self.run.make_live(self._version)
        self.said.clear()
        await self.step()
        assert self.said == []


@contextlib.asynccontextmanager
async def faults(
    model: Path, folder: Path, patch: pytest.MonkeyPatch, dtype: str, rate: float
) -> AsyncIterator[Faults]:
    """A run of two engines with a reward that always has something to learn."""
    file = folder / "fault"
    file.write_text("")
    patch.setenv(faulty.VARIABLE, str(file))
    patch.setattr(placement, "LearnerRank", faulty.Rank)
    patch.setattr(placement, "RolloutWorker", faulty.Worker)
    tree = config(
        model,
        folder / "run",
        write_rows(folder / "rows.jsonl"),
        rollout={"temperature": 0.7, "workers": 2, "dtype": dtype},
        reward={"rewards": [{"kind": "function", "path": "tests.end_to_end.harness:arbitrary"}]},
        learner={"steps": 20, "dtype": dtype, "learning_rate": rate},
    )
    settings = parse(tree)
    prompts = preflight(settings)
    run_folder = RunFolder(settings.run.folder)
    run_folder.lock()
    with Report(20, 0) as report:
        state = fresh_state(settings, prompts)
        checkpoints = Checkpoints(run_folder.checkpoints, keep=1)
        async with open_run(settings, run_folder, checkpoints, prompts, state, report) as run:
            yield Faults(run, file, [])
    run_folder.unlock()


async def test_every_fault_is_noticed_in_float32(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with faults(tiny_model, tmp_path, monkeypatch, "float32", 1e-6) as living:
        await living.first()
        for _ in range(2):
            await living.step()
        assert living.said == []
        assert living.gaps["gap/worker_0/given"] < 2e-6 > living.gaps["gap/worker_1/sampled"]
        for fault in (NOTHING, LEFT_OUT, SWAPPED, OLD):
            line = await living.noticed(fault)
            worker = faulty.ONE if fault == OLD else 0
            assert line.startswith(f"rollout worker {worker} at version "), fault
            assert "the limit is 2e-06 (of float32)" in line, fault
            assert "also after it was loaded again in full" in line, fault
            await living.heal()
        living.set(OLD_ONCE)
        await living.step()
        [line] = living.said
        assert line.startswith("rollout worker 1 at version ")
        assert line.endswith("it is loaded again in full")
        living.set("")
        await living.heal()
        line = await living.noticed(TEMPERATURE)
        assert line.startswith("rollout worker 1 at version ")
        assert "tokens that it sampled" in line
        await living.heal()
        living.set(TEMPERATURE)
        living.forget()
        with pytest.raises(ExceptionGroup) as caught:
            await train(living.run)
        assert "rollout worker 1 at version 0: " in str(first_cause(caught.value))
        assert "at the run's first version" in str(first_cause(caught.value))


async def test_a_mixture_of_experts_in_bfloat16_is_not_stopped_unless_it_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At this rate an update is far below rounding: that nothing arrived shows in answers that are the old ones."""
    folder = tiny.write_experts(tmp_path / "model", "qwen3_moe")
    async with faults(folder, tmp_path, monkeypatch, "bfloat16", 1e-6) as living:
        await living.first()
        for _ in range(5):
            await living.step()
        assert living.said == []
        # near ties of a router fall differently, so the gap of 64 tokens goes up and down; its standard error with it
        assert living.gaps["gap/worker_0/given"] > 1e-4
        for fault, words in (
            (NOTHING, "to the last bit"),
            (OLD, "to the last bit"),
            (SWAPPED, "nats per token away"),
            (TEMPERATURE, "tokens that it sampled"),
        ):
            line = await living.noticed(fault)
            assert line.startswith(f"rollout worker {faulty.ONE if fault in (OLD, TEMPERATURE) else 0} at version ")
            assert words in line
            await living.heal()
