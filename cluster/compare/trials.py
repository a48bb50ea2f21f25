"""The runs of a comparison: which there are, where they lie, and what is refused before the first one starts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from cluster.compare.outcomes import is_finished
from cluster.record.folder import RunFolder
from cluster.run.session import preflight
from cluster.run.state import Change
from cluster.run.state import compare as changes
from configs.load import ConfigError, as_tree, read_yaml
from configs.schema import Config
from configs.stages import Staged, as_stages
from reward.worker import RewardError
from rollout.data.prompts import DataError

SAME = ("model", "data", "reward", "evaluation", "rollout.max_new_tokens", "rollout.stop", "run.evaluate_every")
"""Settings that decide held-out scores beside the method: one code, one data set and one reward."""

METHOD = re.compile(r"(?P<file>[^=]*\.ya?ml)(?::(?P<own>.+=.*))?")
"""FILE.yaml, or FILE.yaml:section.key=value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One method with one seed."""

    method: str
    seed: int
    folder: Path
    """The run's folder."""
    run: Staged
    """What it does; a config without stages is a single one."""

    @property
    def name(self) -> str:
        return f"{self.method} seed {self.seed}"

    @property
    def config(self) -> Config:
        """Of the last stage, which gives the result, with the model that the run starts from."""
        return self.run.stages[-1].config.with_model(self.run.model)

    @property
    def places(self) -> list[Path]:
        """The folder of each stage."""
        return [self.folder / stage.folder for stage in self.run.stages]

    def beside(self, ending: str) -> Path:
        """A file next to the run's folder."""
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    def state(self) -> Literal["new", "begun", "finished"]:
        """'begun' has a checkpoint to go on from; what has none starts anew."""
        if not RunFolder(self.folder).config.is_file():
            return "new"
        steps = [stage.config.learner.steps for stage in self.run.stages]
        if all(is_finished(place, count) for place, count in zip(self.places, steps, strict=True)):
            return "finished"
        checkpoints = any(RunFolder(self.folder).checkpoints.glob("step-*"))
        return "begun" if checkpoints or len(steps) > 1 else "new"  # stages see to themselves where there is none


def planned(configs: Sequence[str], overrides: Sequence[str], seeds: int, out: Path) -> list[Trial]:
    """Every run, method by method. `configs` are FILE.yaml or FILE.yaml:section.key=value, `overrides` are for all.

    Raises ConfigError for configs that are wrong, that cannot be compared with each other, or that changed since
    their runs were begun.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; give 1 or more")
    methods: dict[str, list[Trial]] = {}
    for given in configs:
        name, file, own = _method(given)
        if name in methods:
            raise ConfigError(f"two configs are called '{name}'; rename one of the files")
        tree = read_yaml(file)
        methods[name] = [
            _trial(name, seed, out / name / f"seed-{seed}", tree, [*overrides, *own], file) for seed in range(seeds)
        ]
        _check_scored(methods[name][0])
        _check_same(next(iter(methods.values()))[0], methods[name][0])
    trials = [trial for each in methods.values() for trial in each]
    for trial in trials:
        _check_unchanged(trial)
    return trials


def check_startable(trials: Sequence[Trial]) -> None:
    """What `grao train` would refuse, once for each method that has something to do. Raises ConfigError."""
    waiting = {trial.method: trial for trial in reversed(trials) if trial.state() != "finished"}
    heldout: dict[str, list[str]] = {}
    for method, trial in waiting.items():
        try:
            for stage in trial.run.stages:
                prompts = preflight(stage.config.with_model(trial.run.model))
                heldout[method] = [prompt.id for prompt in prompts.heldout]
        except (ConfigError, DataError, RewardError) as error:
            raise ConfigError(f"{method}: {error}") from error
    first = next(reversed(heldout), "")
    for method, ids in heldout.items():
        if ids != heldout[first]:
            raise ConfigError(
                f"{method} has {len(ids)} held-out prompts and {first} has {len(heldout[first])}, because only one of"
                " them needs reference answers; name data.heldout with a reference in every row"
            )


def split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configs and the overrides among the arguments of the command line."""
    overrides = [one for one in given if "=" in one and not METHOD.fullmatch(one)]
    return [one for one in given if one not in overrides], overrides


def _method(given: str) -> tuple[str, str, list[str]]:
    """Name, file and settings of its own: a file is a method by its name, with a setting by its name and that."""
    found = METHOD.fullmatch(given)
    file, own = (found["file"], found["own"]) if found else (given, None)
    if own is None:
        return Path(file).stem, file, []
    key, _, value = own.partition("=")
    name = f"{Path(file).stem}_{key.rsplit('.', 1)[-1]}_{value}"
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", name), file, [own]


def _trial(name: str, seed: int, folder: Path, tree: DictConfig, overrides: Sequence[str], source: str) -> Trial:
    ours = [f"run.seed={seed}", f"run.folder={json.dumps(str(folder))}"]
    return Trial(method=name, seed=seed, folder=folder, run=as_stages(tree, [*overrides, *ours], source))


def _check_scored(trial: Trial) -> None:
    """Refuse a config whose runs would have no held-out reward."""
    for config in (stage.config for stage in trial.run.stages):
        if config.reward is None:
            raise ConfigError(f"{trial.method}: 'reward' is missing, and a comparison needs it; add it")
        if not config.data.heldout_rows:
            raise ConfigError(f"{trial.method}: data.heldout_rows is 0, so there is nothing to compare; raise it")
        if not config.needs_samples:
            raise ConfigError(
                f"{trial.method}: objective '{config.learner.objective.name}' would be judged by its own value, which"
                " no other method has; set evaluation.answers: samples"
            )


def _check_same(one: Trial, other: Trial) -> None:
    """Refuse a method that differs from another in what all must share."""
    for change in _changes(one.config, other.config):
        if any(change.key == key or change.key.startswith(f"{key}.") for key in SAME):
            raise ConfigError(
                f"{change.key} is {change.old} in '{one.method}' and {change.new} in '{other.method}'; their scores"
                " could not be compared, so make it equal"
            )


def _check_unchanged(trial: Trial) -> None:
    """Refuse to go on with, or to report, a run that was begun with another config."""
    stored = RunFolder(trial.folder).config
    if not stored.is_file():
        return
    before, now = as_stages(read_yaml(stored), source=str(stored)).stages, trial.run.stages
    fix = f"choose another --out, or delete '{trial.folder}'"
    if [stage.folder for stage in before] != [stage.folder for stage in now]:
        raise ConfigError(f"{trial.name} was begun with other stages; {fix}")
    for one, other in zip(before, now, strict=True):
        for change in _changes(one.config, other.config):
            if change.key != "run.folder":
                raise ConfigError(
                    f"{trial.name} was begun with {change.key} {change.old}, and it is {change.new} now; {fix}"
                )


def _changes(old: Config, new: Config) -> list[Change]:
    accepted, refused = changes(as_tree(old), as_tree(new))
    return [*accepted, *refused]
