"""A sequence of runs from one config: `stages:` lists what each of them changes in the sections beside it.

Every stage starts from the model that the one before it exported, the first one from model.path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.load import ConfigError, override, parse, resolved
from configs.schema import Config

KEY = "stages"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One run of the sequence."""

    folder: str
    """Its folder inside run.folder: number and name, e.g. '1-sft'; empty for a config without stages."""
    config: Config
    """The whole config of this run; model.path of a later stage is there only once the stage before has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A config with stages, all of them checked."""

    folder: str
    """run.folder."""
    model: str
    """model.path, from which the first stage starts."""
    stages: tuple[Stage, ...]
    text: str
    """The config as YAML with overrides applied and local paths absolute; reads back to the same stages."""


def is_staged(tree: DictConfig) -> bool:
    return KEY in tree


def without_stages(tree: DictConfig) -> DictConfig:
    """What the stages have in common."""
    content = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(content, dict)
    return OmegaConf.create({key: value for key, value in content.items() if key != KEY})


def as_stages(tree: DictConfig, overrides: Sequence[str] = (), source: str = "config") -> Staged:
    """`parse_stages`, for which a config without stages is a single one, in run.folder itself. Raises ConfigError."""
    if is_staged(tree):
        return parse_stages(tree, overrides, source)
    config = parse(tree, overrides, source)
    only = Stage(folder="", config=config)
    return Staged(folder=config.run.folder, model=config.model.path, stages=(only,), text=resolved(config))


def parse_stages(tree: DictConfig, overrides: Sequence[str] = (), source: str = "config") -> Staged:
    """Check every stage with overrides applied. Raises ConfigError.

    `section.key=value` changes what the stages have in common, before each of them changes it;
    `stages.NAME.section.key=value` changes one stage.
    """
    ours = [one for one in overrides if one.startswith(f"{KEY}.")]
    base = override(without_stages(tree), [one for one in overrides if one not in ours])
    changes = _changes(tree[KEY], ours, source)
    folder, first = _given(base, "run.folder", source), _given(base, "model.path", source)
    stages: list[Stage] = []
    model = first
    for number, (name, change) in enumerate(changes.items(), start=1):
        path = Path(folder) / f"{number}-{name}"
        where = f"{source}, stage '{name}'"
        merged = _merged(base, change, where)
        merged.model.path, merged.run.folder = model, str(path)
        if stages and stages[-1].config.learner.objective.trains_scores:
            raise ConfigError(
                f"{where} cannot start from the reward model of the stage before; train that in a run of its own"
            )
        stages.append(Stage(folder=path.name, config=parse(merged, source=where)))
        model = str((path / "model").resolve())
    whole = {**_plain(base), KEY: [{"name": name, **_plain(change)} for name, change in changes.items()]}
    text = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    return Staged(folder=folder, model=first, stages=tuple(stages), text=text)


def _changes(listed: Any, overrides: Sequence[str], source: str) -> dict[str, DictConfig]:
    """What each stage changes, by its name, in order."""
    found: dict[str, DictConfig] = {}
    for stage in OmegaConf.to_container(listed, resolve=False) if OmegaConf.is_list(listed) else ():
        name = stage.get("name") if isinstance(stage, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{source}: stage {len(found) + 1} needs a 'name' of letters, digits, '-' and '_', e.g. {{name: sft,"
                " learner: {objective: sft}}"
            )
        if name in found:
            raise ConfigError(f"{source}: two stages are called '{name}'; give each its own name")
        mine = [one.removeprefix(f"{KEY}.{name}.") for one in overrides if one.startswith(f"{KEY}.{name}.")]
        found[name] = override({key: value for key, value in stage.items() if key != "name"}, mine)
        _check_sections(found[name], f"{source}, stage '{name}'")
    if not found:
        raise ConfigError(
            f"{source}: '{KEY}' must list at least one stage, e.g. - {{name: sft, learner: {{steps: 30}}}}"
        )
    for one in overrides:
        if not any(one.startswith(f"{KEY}.{name}.") for name in found):
            known = ", ".join(found)
            raise ConfigError(f"override '{one}' must look like {KEY}.NAME.section.key=value, NAME one of {known}")
    return found


def _check_sections(change: DictConfig, where: str) -> None:
    for section, values in change.items():
        if not isinstance(values, DictConfig):
            raise ConfigError(f"{where}: '{section}' must hold settings such as 'learner: {{steps: 30}}'")
    for key in ("model", "run.folder"):
        if OmegaConf.select(change, key) is not None:
            raise ConfigError(f"{where}: '{key}' follows from the stages; take it out, or give it beside '{KEY}'")


def _merged(base: DictConfig, change: DictConfig, where: str) -> DictConfig:
    """Sections are merged key by key; lists, and an objective that is named, are replaced as a whole."""
    try:
        merged = OmegaConf.merge(base, change)
        objective = OmegaConf.select(change, "learner.objective")
        if isinstance(objective, DictConfig) and "name" in objective:
            OmegaConf.update(merged, "learner.objective", objective, merge=False)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{where}: cannot be merged with the sections beside '{KEY}': {error}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _given(base: DictConfig, key: str, source: str) -> str:
    value = OmegaConf.select(base, key)
    if not isinstance(value, str):
        raise ConfigError(f"{source}: '{key}' is missing; add it")
    return value


def _plain(tree: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
