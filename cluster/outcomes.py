"""What one run of a comparison came to, read from its folder.

A run with stages has one folder per stage inside its own: its steps are counted over all of them, and the last one is
its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.metrics import read_lines
from cluster.run_folder import RunFolder
from configs.load import ConfigError, parse, read_yaml
from configs.schema import Config
from reward.metrics import rates

SCORE = "reward/mean"
"""The measure by which methods are compared: mean reward on held-out prompts."""

Curve = tuple[tuple[int, float], ...]
"""(step, value), by step."""


class OutcomeError(ValueError):
    """A run that cannot be compared. One line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One finished run."""

    method: str
    seed: int
    config: Config
    """As it was run; of the last stage."""
    heldout: Curve
    """SCORE by step, from the start model to the last step."""
    final: Mapping[str, float]
    """All measures of the last evaluation, by the names of docs/metrics.md."""
    rewards: Mapping[str, float]
    """Mean reward of the last evaluation by prompt id; empty where it was not recorded."""
    training: Curve
    """Mean reward of the samples that were trained on; empty for objectives without samples."""
    shares: Mapping[str, Curve]
    """Of each term of the objective."""
    heldout_prompts: int
    trained_prompts: int
    """Groups trained, one prompt each."""
    tokens: float
    """Generated for training."""
    seconds: float
    """Wall time of the steps without their evaluations."""


def stages(folder: Path) -> list[Path]:
    """The folders of a run's stages in order; a run without stages is its own only one."""
    return sorted(file.parent for file in folder.glob("*/steps.jsonl")) or [folder]


def steps_done(folder: Path) -> int:
    """Lines of the last stage's steps.jsonl; safe while the run goes on."""
    file = RunFolder(stages(folder)[-1]).steps
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def is_finished(folder: Path, steps: int) -> bool:
    """Whether all steps are done and the model is exported."""
    return RunFolder(stages(folder)[-1]).model.is_dir() and steps_done(folder) >= steps


def read_outcome(method: str, seed: int, folder: Path) -> Outcome:
    """Raises OutcomeError for a folder without a finished run or without evaluations of sampled answers."""
    parts = [RunFolder(path) for path in stages(folder)]
    if not parts[-1].config.is_file():
        raise OutcomeError("it has not begun")
    try:
        configs = [parse(read_yaml(part.config)) for part in parts]
        steps = [read_lines(part.steps) for part in parts]
        evaluations = [read_lines(part.evaluations) for part in parts]
    except (ConfigError, OSError, ValueError) as error:
        raise OutcomeError(f"'{folder}' cannot be read: {error}") from error
    wanted = configs[-1].learner.steps
    if not is_finished(folder, wanted):
        raise OutcomeError(f"it is not finished: {steps_done(folder)} of {wanted} steps done")
    trained = _on_one_axis(steps, steps)
    # The first evaluation of a later stage is of the model that the stage before ended with.
    judged = _on_one_axis([evaluations[0], *(part[1:] for part in evaluations[1:])], steps)
    if not judged or any(SCORE not in record["metrics"] for _, record in judged):
        raise OutcomeError(
            "its evaluations have no sampled answers, so it has no held-out reward; see `evaluation` in"
            " configs/schema.py and docs/evaluation.md"
        )
    first, last = judged[0][1], judged[-1][1]
    against_start = _against_start(last, first)
    # a stage's own NAG is against the model it started from, not the run's
    final = {**last["metrics"], **against_start} if len(parts) > 1 else {**against_start, **last["metrics"]}
    if {"reference/win", "reference/tie"} <= final.keys():
        final["reference/win_or_tie"] = final["reference/win"] + final["reference/tie"]
    return Outcome(
        method=method,
        seed=seed,
        config=configs[-1],
        heldout=tuple((step, record["metrics"][SCORE]) for step, record in judged),
        final=final,
        rewards={prompt: sum(each) / len(each) for prompt, each in last.get("rewards", {}).items()},
        training=tuple((step, record["metrics"][SCORE]) for step, record in trained if SCORE in record["metrics"]),
        shares=_shares(trained),
        heldout_prompts=last["prompts"],
        trained_prompts=sum(one.learner.groups_per_step * len(done) for one, done in zip(configs, steps, strict=True)),
        tokens=sum(record["metrics"].get("tokens/generated", 0.0) for _, record in trained),
        seconds=sum(record["seconds"].get(phase, 0.0) for _, record in trained for phase in ("wait", "train", "sync")),
    )


def _on_one_axis(
    parts: Sequence[Sequence[Mapping[str, Any]]], steps: Sequence[Sequence[Mapping[str, Any]]]
) -> list[tuple[int, Mapping[str, Any]]]:
    """The records of all stages, each with its step counted from the start of the run."""
    before, found = 0, []
    for records, done in zip(parts, steps, strict=True):
        found += [(before + record["step"], record) for record in records]
        before += len(done)
    return found


def _against_start(last: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float]:
    """NAG from the rewards of two evaluations, answer against answer; nothing where they were not recorded."""
    after, before = last.get("rewards", {}), first.get("rewards", {})
    if not after or after.keys() != before.keys():
        return {}
    found = [rates(after[prompt], before[prompt]) for prompt in after]
    return {
        "nag/rate": sum(one.win for one in found) / len(found),
        "nag/net": sum(one.win - one.loss for one in found) / len(found),
    }


def _shares(trained: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Curve]:
    names = dict.fromkeys(name for _, record in trained for name in record["shares"])
    return {
        name: tuple((step, record["shares"][name]) for step, record in trained if name in record["shares"])
        for name in names
    }
