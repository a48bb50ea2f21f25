"""How far a run has come, saved with every checkpoint, and which settings may change when it goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.record.files import write_whole
from cluster.run.checkpoints import CheckpointError, name_of
from cluster.run.gap import BOUNDS, Measured
from cluster.run.queue import Position

FILE = "run_state.json"

FIXED: Mapping[str, str] = {
    "model.path": "the checkpoint holds this model's parameters and the prompts are its tokens",
    "data": "the order of the prompts and what was trained of it follow from the data",
    "learner.dtype": "the checkpoint's parameters have its type",
    "run.seed": "the order of the prompts follows from it",
    "evaluation": "every evaluation of a run is compared with its first",
}
"""Settings (or whole sections) that a run keeps for life, with the reason. All others may change on resume."""

_ABSENT = "(absent)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Everything of a run's progress that is not in the learner's checkpoint."""

    step: int
    """Updates done; the version of the parameters."""
    position: Position
    """Oldest prompt position not yet trained, and those trained ahead of it."""
    seed: int
    """run.seed, from which the order of the prompts and the seed of every sample follow."""
    config_hash: str
    """configs.load.fingerprint of the config that wrote this state."""
    data_fingerprint: str
    """PromptSet.fingerprint of the prompts."""
    gap: Measured | None = None
    """What rounding makes between engine and learner; None where nobody has looked yet."""

    @property
    def checkpoint(self) -> str:
        """Name of the folder in checkpoints/ that belongs to this state."""
        return name_of(self.step)

    def after(self, tickets: Iterable[int]) -> RunState:
        """The state once one more update has trained these tickets. Raises ValueError if one was trained before."""
        return replace(self, step=self.step + 1, position=self.position.after(tickets))

    def save(self, folder: Path) -> None:
        """Write run_state.json into a checkpoint's folder. Raises OSError."""
        record = {
            "step": self.step,
            "oldest": self.position.oldest,
            "ahead": sorted(self.position.ahead),
            "seed": self.seed,
            "config_hash": self.config_hash,
            "data_fingerprint": self.data_fingerprint,
            "gap": None if self.gap is None else {"dtype": self.gap.dtype, "mean": self.gap.mean},
        }
        write_whole(folder / FILE, json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read what `save` wrote. Raises CheckpointError."""
        file = folder / FILE
        try:
            record = json.loads(file.read_bytes())
            return cls(
                step=_whole(record["step"]),
                position=Position(
                    oldest=_whole(record["oldest"]), ahead=frozenset(_whole(ticket) for ticket in record["ahead"])
                ),
                seed=_whole(record["seed"]),
                config_hash=str(record["config_hash"]),
                data_fingerprint=str(record["data_fingerprint"]),
                gap=_measured(record.get("gap")),
            )
        except FileNotFoundError as error:
            raise CheckpointError(f"'{file}' is missing; this is no checkpoint of a run") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"'{file}' was written by another version of this program: {error!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One setting that differs between the run's config and the new one."""

    key: str
    """As in YAML, e.g. 'learner.learning_rate'."""
    old: str
    new: str
    reason: str
    """Why it must not change; empty where it may."""

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}" + (f" ({self.reason})" if self.reason else "")


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[Change], list[Change]]:
    """Changes between two configs as plain trees (configs.load.as_tree): (accepted, refused), sorted by key."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    accepted: list[Change] = []
    refused: list[Change] = []
    for key in sorted(before.keys() | after.keys()):
        was, is_now = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if was == is_now:
            continue
        reason = next((why for fixed, why in FIXED.items() if key == fixed or key.startswith(f"{fixed}.")), "")
        (refused if reason else accepted).append(Change(key=key, old=was, new=is_now, reason=reason))
    return accepted, refused


def check_data(state: RunState, fingerprint: str) -> None:
    """Raise CheckpointError unless the prompts are those of the run: the same file may have got other rows."""
    if state.data_fingerprint != fingerprint:
        raise CheckpointError(
            "the rows behind data.train are not those that this run was started with"
            f" (fingerprint {fingerprint[:12]}, was {state.data_fingerprint[:12]});"
            " put the old data back or start a new run in another run.folder"
        )


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """('section.key', value as JSON) for every value; lists of sections are gone into by number."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and tree and all(isinstance(item, Mapping) for item in tree):
        for index, item in enumerate(tree):
            yield from _leaves(item, f"{prefix}.{index}")
    else:
        yield prefix, json.dumps(tree, sort_keys=True, ensure_ascii=False)


def _measured(record: Any) -> Measured | None:
    """What stands under 'gap'; older checkpoints have no such thing. Raises ValueError."""
    if record is None:
        return None
    mean = float(record["mean"])
    if record["dtype"] not in BOUNDS or not math.isfinite(mean):
        raise ValueError(f"no gap: {record}")
    return Measured(dtype=record["dtype"], mean=mean)


def _whole(value: Any) -> int:
    """The value itself if it is a whole number; JSON's true and 1.5 are none."""
    if type(value) is not int:
        raise ValueError(f"{value!r} is no whole number")
    return value
