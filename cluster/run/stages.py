"""A sequence of stages: one run after the other, each in a folder of its own inside run.folder.

A stage is an ordinary run, which `grao resume` can take further by itself; this file only says which is next.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from cluster.record.files import write_whole
from cluster.record.folder import RunFolder
from cluster.run.session import held_folder, preflight, run_session
from cluster.run.signals import cancel_on_signals
from configs.load import ConfigError
from configs.stages import Staged
from reward.worker import RewardError
from rollout.data.prompts import DataError, PromptSet

Action = Literal["skip", "resume", "again", "start"]
WORDS: dict[Action, str] = {
    "skip": "done",
    "resume": "going on",
    "again": "begun again, since it had no checkpoint",
    "start": "begun",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a stage has left in its folder."""

    started: bool
    checkpoint: bool
    exported: bool


def action(found: Progress) -> Action:
    """Whether a stage is done, goes on, is begun again because it had not come to a checkpoint, or is begun."""
    if found.exported:
        return "skip"
    if found.checkpoint:
        return "resume"
    return "again" if found.started else "start"


def progress(folder: RunFolder) -> Progress:
    return Progress(
        started=folder.config.is_file(),
        checkpoint=any(folder.checkpoints.glob("step-*")),
        exported=folder.model.is_dir(),
    )


def check_stages(staged: Staged) -> list[PromptSet]:
    """Everything that can be refused before the first stage starts; the prompts of each stage. Raises ConfigError."""
    found = []
    for stage in staged.stages:
        try:
            found.append(preflight(stage.config.with_model(staged.model)))
        except (ConfigError, DataError, RewardError) as error:
            raise ConfigError(f"stage '{stage.folder}': {error}") from error
    return found


async def run_stages(staged: Staged, resume: bool) -> None:
    """Run the stages that are not done yet. Raises the first failure, after everything that was started has ended."""
    cancel_on_signals()
    check_stages(staged)
    console = Console(highlight=False)
    with held_folder(staged.folder, resume) as folder:
        places = [folder.path / stage.folder for stage in staged.stages]
        actions = [action(progress(RunFolder(place))) for place in places]
        if all(one == "skip" for one in actions):
            raise ConfigError(
                f"all stages in '{folder.path}' are done; take the last one further with `grao resume {places[-1]}"
                f" learner.steps={2 * staged.stages[-1].config.learner.steps}`"
            )
        write_whole(folder.config, staged.text)
        for stage, place, what in zip(staged.stages, places, actions, strict=True):
            console.print(f"stage {stage.folder}: {WORDS[what]}", markup=False)
            if what == "again":
                set_aside(place)
            if what != "skip":
                await run_session(stage.config, resume=what == "resume")


def set_aside(place: Path) -> None:
    """Keep what a stage without a checkpoint has written under another name. Raises RunFolderError if it still runs."""
    aside = place.with_name(f"unfinished-{place.name}")
    with held_folder(str(place), resume=True):
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
