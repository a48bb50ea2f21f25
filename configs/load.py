"""One YAML file plus `section.key=value` overrides become a checked Config, or one clear line of error."""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from configs.data import ONE, SEVERAL, DataSource
from configs.rewards import AnyReward
from configs.schema import Config, LearnerConfig


class ConfigError(ValueError):
    """A config that cannot run. One line that names the field and the fix."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, apply overrides in order, check everything that needs no cluster.

    Raises ConfigError.
    """
    return parse(read_yaml(path), overrides, source=str(path))


def read_yaml(path: str | Path) -> DictConfig:
    """The mapping in a YAML file. Raises ConfigError where the file is missing or is no mapping."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"config file '{path}' does not exist{_suggest(file.name, _siblings(file))}")
    try:
        tree = OmegaConf.load(file)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config file '{path}' is not valid YAML: {_one_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"config file '{path}' must hold sections such as 'model:' and 'data:'")
    return tree


def parse(tree: Mapping[str, Any] | DictConfig, overrides: Sequence[str] = (), source: str = "config") -> Config:
    """Check a mapping with overrides applied. Raises ConfigError."""
    merged = override(tree, overrides)
    try:
        return Config.model_validate(OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from error
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error.errors()[0])}") from error


def override(tree: Mapping[str, Any] | DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A copy of a mapping with `section.key=value` applied in order and local paths absolute. Raises ConfigError."""
    merged = OmegaConf.create(tree if isinstance(tree, DictConfig) else dict(tree))
    _name_objective(merged)
    for one in overrides:
        _apply(merged, one)
        _name_objective(merged)
    _make_absolute(merged)
    return merged


def resolved(config: Config) -> str:
    """The whole config as YAML, every default written out. `load` reads it back to an equal Config."""
    return yaml.safe_dump(as_tree(config), sort_keys=False, allow_unicode=True)


def as_tree(config: Config) -> dict[str, Any]:
    """The config as plain mappings and lists, names as in YAML."""
    return config.model_dump(mode="json", by_alias=True)


def fingerprint(config: Config) -> str:
    """Hex digest of the resolved config: equal exactly for equal configs."""
    return hashlib.sha256(json.dumps(as_tree(config), sort_keys=True).encode()).hexdigest()


def field_names(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every 'section.key' of the schema, as a user writes it."""
    for name, field in model.model_fields.items():
        label = f"{prefix}{field.alias or name}"
        inner = _sections_of(field.annotation)
        if len(inner) != 1:
            yield label
        # several sections are a choice of one, and they share names
        yield from dict.fromkeys(name for section in inner for name in field_names(section, f"{label}."))


def _apply(tree: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}' must look like section.key=value")
    known = list(field_names())
    if not any(key == name or key.startswith(f"{name}.") for name in known) and key not in Config.model_fields:
        raise ConfigError(f"unknown key '{key}'{_nearest(key, known)}")
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])["value"]
        OmegaConf.update(tree, key, value, merge=False)
    except (yaml.YAMLError, OmegaConfBaseException, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"override '{override}' cannot be applied: {_one_line(error)}") from error


def _name_objective(tree: DictConfig) -> None:
    """`learner.objective: grpo` becomes {name: grpo}, so that a later override can reach into it."""
    learner = tree.get("learner")
    if isinstance(learner, DictConfig) and isinstance(learner.get("objective"), str):
        learner["objective"] = {"name": learner["objective"]}


def _make_absolute(tree: DictConfig) -> None:
    """Local paths become absolute: workers run in other folders, and a run may be resumed from another one."""
    has_objective = isinstance(OmegaConf.select(tree, "learner.objective"), DictConfig)
    for key in ("model.path", *_sources(tree), *(["learner.objective.critic"] if has_objective else [])):
        value = OmegaConf.select(tree, key)
        if isinstance(value, str) and value and Path(value).expanduser().exists():
            OmegaConf.update(tree, key, str(Path(value).expanduser().resolve()))
    rewards = OmegaConf.select(tree, "reward.rewards")
    for reward in rewards if isinstance(rewards, ListConfig) else ():
        if isinstance(reward, DictConfig) and reward.get("kind") == "model":
            path = Path(str(reward.get("path"))).expanduser()
            if path.exists():
                reward["path"] = str(path.resolve())


def _sources(tree: DictConfig) -> Iterator[str]:
    """The keys under which sources of data are named, in a list each by itself."""
    for key in ("data.train", "data.heldout"):
        given = OmegaConf.select(tree, key)
        if isinstance(given, ListConfig):
            for number, source in enumerate(given):
                yield f"{key}.{number}.path" if isinstance(source, DictConfig) else f"{key}.{number}"
        else:
            yield key


def _explain(error: ErrorDetails) -> str:
    """One line for one pydantic error: the field as a user writes it, what is wrong, the nearest valid name."""
    # pydantic puts the tag of a choice into the path: reward.rewards.0.exact.foo, learner.objective.grao.beta
    path = [str(part) for part in error["loc"] if not str(part).endswith("Reward") and part not in (ONE, SEVERAL)]
    if path[:2] == ["learner", "objective"]:
        del path[2:3]
    label = ".".join("lambda" if part == "lambda_" else part for part in path)
    if error["type"] == "extra_forbidden":
        return f"unknown key '{label}'{_nearest(label, _known_beside(error['loc']))}"
    if error["type"] == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in error["ctx"]["expected_tags"].split(",")]
        given = error["ctx"]["tag"]
        return f"'{label}' is '{given}', not one of {', '.join(tags)}{_nearest(given, tags)}"
    if error["type"] == "missing":
        return f"'{label}' is missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message[1:2].islower() else message
    if error["type"] == "value_error":
        return f"{label}: {message}" if label else message
    return f"'{label}' is {json.dumps(error['input'], default=str)[:80]}: {message}"


def _known_beside(location: tuple[int | str, ...]) -> list[str]:
    if "rewards" in location:
        prefix = ".".join(str(part) for part in location[:-1])
        return [f"{prefix}.{name}" for name in _reward_fields(str(location[-2]))]
    if SEVERAL in location:
        prefix = ".".join(str(part) for part in location[:-1] if part != SEVERAL)
        return [f"{prefix}.{name}" for name in DataSource.model_fields]
    if location[:2] == ("learner", "objective"):
        choices = _sections_of(LearnerConfig.model_fields["objective"].annotation)
        tag = str(location[2])
        chosen = next(one for one in choices if tag in typing.get_args(one.model_fields["name"].annotation))
        return list(field_names(chosen, "learner.objective."))
    return [*field_names(), *Config.model_fields]


def _reward_fields(kind: str) -> list[str]:
    unions = typing.get_args(typing.get_args(AnyReward)[0])
    by_kind = {typing.get_args(model.model_fields["kind"].annotation)[0]: model for model in unions}
    return list(by_kind[kind].model_fields) if kind in by_kind else ["kind"]


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _nearest(name: str, known: Sequence[str]) -> str:
    # a right key in a wrong section comes first: 'objective.beta' means 'learner.objective.beta'
    last = name.rsplit(".", 1)[-1]
    return _suggest(name, [other for other in known if other.rsplit(".", 1)[-1] == last] or known)


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    return f"; did you mean '{close[0]}'?" if close else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _siblings(file: Path) -> list[str]:
    return [other.name for other in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
