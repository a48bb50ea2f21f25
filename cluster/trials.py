"""The runs of a comparison: which there are, where they lie, and what is refused before the first one starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.outcomes import is_finished, stages
from cluster.run_folder import RunFolder
from cluster.run_state import Change
from cluster.run_state import compare as changes
from cluster.session import preflight
from configs.load import ConfigError, as_tree, load, parse, read_yaml
from configs.schema import Config
from reward.worker import RewardError
from rollout.prompts import DataError

SAME = ("model", "data", "reward", "evaluation", "rollout.max_new_tokens", "rollout.stop", "run.evaluate_every")
"""Settings that decide held-out scores beside the method: one code, one data set and one reward."""

METHOD = re.compile(r"(?P<file>[^=]*\.ya?ml)(?::(?P<own>.+=.*))?")
"""FILE.yaml, or FILE.yaml:section.key=value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One method with one seed."""

    method: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.method} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.folder)

    def beside(self, ending: str) -> Path:
        """A file next to the run's folder."""
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    def state(self) -> Literal["new", "begun", "finished"]:
        """'begun' has a checkpoint to go on from; what has none starts anew."""
        if not RunFolder(self.folder).config.is_file():
            return "new"
        if is_finished(self.folder, self.config.learner.steps):
            return "finished"
        checkpoints = [path for part in stages(self.folder) for path in RunFolder(part).checkpoints.glob("step-*")]
        return "begun" if checkpoints else "new"


def planned(configs: Sequence[str], overrides: Sequence[str], seeds: int, out: Path) -> list[Trial]:
    """Every run, method by method. `configs` are FILE.yaml or FILE.yaml:section.key=value, `overrides` are for all.

    Raises ConfigError for configs that are wrong, that cannot be compared with each other, or that changed since
    their runs were begun.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; give 1 or more")
    methods: dict[str, Config] = {}
    for given in configs:
        name, config = _method(given, overrides)
        if name in methods:
            raise ConfigError(f"two configs are called '{name}'; rename one of the files")
        _check_scored(name, config)
        _check_same({**methods, name: config})
        methods[name] = config
    trials = [
        Trial(method=name, seed=seed, config=_of_seed(config, seed, out / name / f"seed-{seed}"))
        for name, config in methods.items()
        for seed in range(seeds)
    ]
    for trial in trials:
        _check_unchanged(trial)
    return trials


def check_startable(trials: Sequence[Trial]) -> None:
    """What `grao train` would refuse, once for each method that has something to do. Raises ConfigError."""
    waiting = {trial.method: trial for trial in reversed(trials) if trial.state() != "finished"}
    for method, trial in waiting.items():
        try:
            preflight(trial.config)
        except (ConfigError, DataError, RewardError) as error:
            raise ConfigError(f"{method}: {error}") from error


def split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configs and the overrides among the arguments of the command line."""
    overrides = [one for one in given if "=" in one and not METHOD.fullmatch(one)]
    return [one for one in given if one not in overrides], overrides


def _method(given: str, overrides: Sequence[str]) -> tuple[str, Config]:
    """A file is a method by its name; with a setting of its own, by its name and that setting."""
    found = METHOD.fullmatch(given)
    file, own = (found["file"], found["own"]) if found else (given, None)
    if own is None:
        return Path(file).stem, load(file, overrides)
    key, _, value = own.partition("=")
    name = f"{Path(file).stem}_{key.rsplit('.', 1)[-1]}_{value}"
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", name), load(file, [*overrides, own])


def _of_seed(config: Config, seed: int, folder: Path) -> Config:
    run = config.run.model_copy(update={"seed": seed, "folder": str(folder)})
    return config.model_copy(update={"run": run})


def _check_scored(name: str, config: Config) -> None:
    """Refuse a config whose runs would have no held-out reward."""
    if config.reward is None:
        raise ConfigError(f"{name}: 'reward' is missing, and a comparison needs it; add it")
    if not config.data.heldout_rows:
        raise ConfigError(f"{name}: data.heldout_rows is 0, so there would be nothing to compare; raise it")
    if not config.rollout_workers:
        raise ConfigError(
            f"{name}: objective '{config.learner.objective.name}' starts no rollout worker, so no held-out prompt would"
            " be answered; see `evaluation` in configs/schema.py"
        )


def _check_same(methods: dict[str, Config]) -> None:
    """Refuse the last config where it differs from the first in what all must share."""
    first, last = next(iter(methods)), next(reversed(methods))
    for change in _changes(methods[first], methods[last]):
        if any(change.key == key or change.key.startswith(f"{key}.") for key in SAME):
            raise ConfigError(
                f"{change.key} is {change.old} in '{first}' and {change.new} in '{last}'; their scores could not be"
                " compared, so make it equal"
            )


def _check_unchanged(trial: Trial) -> None:
    """Refuse to go on with, or to report, a run that was begun with another config."""
    stored = RunFolder(trial.folder).config
    if not stored.is_file():
        return
    for change in _changes(parse(read_yaml(stored), source=str(stored)), trial.config):
        if change.key != "run.folder":
            raise ConfigError(
                f"{trial.name} was begun with {change.key} {change.old}, and it is {change.new} now; choose another"
                f" --out, or delete '{trial.folder}'"
            )


def _changes(old: Config, new: Config) -> list[Change]:
    accepted, refused = changes(as_tree(old), as_tree(new))
    return [*accepted, *refused]
