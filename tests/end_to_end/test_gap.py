"""Rollout and learner give the same tokens the same log-probability, update after update; a missed update shows."""

from __future__ import annotations

from pathlib import Path

from cluster.record.folder import RunFolder
from cluster.record.metrics import step_report
from cluster.record.report import Report
from cluster.run.checkpoints import Checkpoints
from cluster.run.driver import sample_and_score, seed_of
from cluster.run.parts import Run, open_run
from cluster.run.session import fresh_state, preflight
from configs.load import parse
from rollout.types import Sampling
from tests.end_to_end.harness import config, write_rows

ROUNDING = 1e-4  # float32 on both sides; a missed update is off by far more


async def gaps(run: Run, first: int, last: int, missed: int | None) -> list[float]:
    """The mean gap of the steps from `first` to `last`; the parameters of step `missed` never reach the engine."""
    found = []
    for step in range(first, last + 1):
        sampling = Sampling(samples=4, temperature=0.7, top_p=1.0, max_new_tokens=12, stop=(), seed=seed_of(0, step))
        groups = [await sample_and_score(run, prompt, sampling) for prompt in run.prompts.train[:2]]
        reports = await run.learner.train_step(step, groups)
        found.append(step_report(step, groups, reports, run.objective, {}).metrics["gap/trained_mean"])
        if step != missed:
            await run.make_live(step)
    return found


async def test_the_gap_stays_at_rounding_over_ten_updates_and_tells_of_a_missed_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    tree = config(
        tiny_model,
        tmp_path / "run",
        write_rows(tmp_path / "rows.jsonl"),
        rollout={"temperature": 0.7},
        # never solved, so that every step has something to learn
        reward={"rewards": [{"kind": "function", "path": "tests.end_to_end.harness:arbitrary"}]},
        learner={"ranks": 2, "steps": 20},
    )
    settings = parse(tree)
    prompts = preflight(settings)
    folder = RunFolder(settings.run.folder)
    folder.lock()
    checkpoints = Checkpoints(folder.checkpoints, keep=1)
    state = fresh_state(settings, prompts)
    with Report(20, 0) as report:
        async with open_run(settings, folder, checkpoints, prompts, state, report) as run:
            await run.make_live(0)
            whole = await gaps(run, 1, 10, missed=None)
            broken = await gaps(run, 11, 20, missed=15)
    folder.unlock()
    assert max(whole) < ROUNDING
    assert broken[5] > 10 * ROUNDING, "step 16 sampled with the parameters of step 14 and nobody would know"
    assert max(broken[:5] + broken[6:]) < ROUNDING, "the next update that arrives heals the gap"
