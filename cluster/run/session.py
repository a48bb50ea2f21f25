"""From a config to a finished run: check, lock the folder, restore, train, report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cluster.record.files import write_whole
from cluster.record.folder import RunFolder
from cluster.record.metrics import cut_after, read_lines
from cluster.record.report import Report
from cluster.run.checkpoints import Checkpoints
from cluster.run.driver import train
from cluster.run.outlook import bad_rows_note
from cluster.run.parts import open_run
from cluster.run.preflight import (
    check_all_rewards,
    check_folder,
    check_learner,
    check_model,
    check_pairs,
    read_prompts,
)
from cluster.run.queue import Position
from cluster.run.signals import cancel_on_signals
from cluster.run.state import RunState, check_data, compare
from configs.load import ConfigError, as_tree, fingerprint, parse, read_yaml, resolved
from configs.schema import Config
from learner.objectives.describe import describe_corrections
from rollout.data.prompts import PromptSet


def preflight(config: Config) -> PromptSet:
    """Everything that can be refused before a worker starts.

    Raises ConfigError, DataError, LearnerError or RewardError.
    """
    check_folder(config)
    tokenizer = check_model(config)
    check_learner(config)
    check_all_rewards(config)
    prompts = read_prompts(config, tokenizer)
    check_pairs(config, prompts)
    return prompts


async def run_session(config: Config, resume: bool) -> None:
    """Train to the end. Raises the first failure, after everything that was started has ended."""
    cancel_on_signals()
    prompts = preflight(config)
    with held_folder(config.run.folder, resume) as folder:
        checkpoints = Checkpoints(folder.checkpoints, config.run.keep_checkpoints)
        state, notes = _restore(config, folder, checkpoints, prompts) if resume else (fresh_state(config, prompts), [])
        write_whole(folder.config, resolved(config))
        what = "reward" if config.learner.objective.online else "objective"
        with Report(config.learner.steps, state.step, what) as report:
            for note in [*prompts.notes, *_bad_rows(prompts, folder), *notes, *describe_corrections(config)]:
                report.note(note)
            report.recall(read_lines(folder.steps), read_lines(folder.evaluations))
            async with open_run(config, folder, checkpoints, prompts, state, report) as run:
                await train(run)
                report.phase("ending")
            report.end(folder, str(checkpoints.path_of(config.learner.steps)))


@contextlib.contextmanager
def held_folder(path: str, resume: bool) -> Iterator[RunFolder]:
    """A run's folder, locked; with `resume` it must hold a run, else it must hold none. Raises RunFolderError."""
    folder = RunFolder(Path(path).resolve())
    if resume:
        folder.require_run()
    folder.lock()
    try:
        if not resume:
            folder.require_new()
        yield folder
    finally:
        folder.unlock()


def _bad_rows(prompts: PromptSet, folder: RunFolder) -> list[str]:
    """What to say about rows that were skipped; all of them are named in a file of the run."""
    if not prompts.skipped:
        return []
    write_whole(folder.skipped, "".join(f"{bad}\n" for bad in prompts.skipped))
    notes = []
    if prompts.twins:
        notes.append(f"{len(prompts.twins)} generated prompts that are held out are not trained on")
    said = bad_rows_note(prompts)
    if said is not None:
        notes.append(f"{said}; e.g. {prompts.bad[0]}; all are named in {folder.skipped}")
    return notes


def fresh_state(config: Config, prompts: PromptSet) -> RunState:
    """The state of a run that has trained nothing yet."""
    return RunState(
        step=0,
        position=Position(),
        seed=config.run.seed,
        config_hash=fingerprint(config),
        data_fingerprint=prompts.fingerprint,
    )


def _restore(
    config: Config, folder: RunFolder, checkpoints: Checkpoints, prompts: PromptSet
) -> tuple[RunState, list[str]]:
    """The state of the newest whole checkpoint, and what to say about it."""
    accepted, refused = compare(as_tree(parse(read_yaml(folder.config))), as_tree(config))
    if refused:
        raise ConfigError(f"this run cannot go on with {refused[0]}; start a new run in another run.folder")
    found = checkpoints.latest()
    if found is None:
        raise ConfigError(
            f"run.folder '{folder.path}' holds no checkpoint yet; delete it and start again with `grao train`"
        )
    state = RunState.load(found.path)
    check_data(state, prompts.fingerprint)
    if state.step >= config.learner.steps and folder.model.is_dir():
        raise ConfigError(
            f"the run in '{folder.path}' has done its {state.step} steps; give more,"
            f" e.g. learner.steps={2 * state.step}"
        )
    checkpoints.rewind(state.step)
    for file in (folder.steps, folder.samples, folder.evaluations):
        cut_after(file, state.step)
    state = replace(state, config_hash=fingerprint(config))
    notes = [*found.refused, *(f"changed since then: {change}" for change in accepted if change.key != "run.folder")]
    return state, [f"going on from checkpoint {found.path.name}, step {state.step}", *notes]
