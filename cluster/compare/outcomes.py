"""What one run of a comparison came to, read from its folder.

The steps of a run with stages are counted over all of them, and the last stage is its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.record.folder import RunFolder
from cluster.record.metrics import read_lines
from configs.load import ConfigError, read_yaml
from configs.schema import Config
from configs.stages import as_stages
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
    model: str
    """Where it started from."""
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


def steps_done(folder: Path) -> int:
    """Lines of a stage's steps.jsonl; safe while it goes on."""
    file = RunFolder(folder).steps
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a stage's steps are done and its model is exported."""
    return RunFolder(folder).model.is_dir() and steps_done(folder) >= steps


def read_outcome(method: str, seed: int, folder: Path) -> Outcome:
    """Raises OutcomeError for a folder without a finished run or without evaluations of sampled answers."""
    if not RunFolder(folder).config.is_file():
        raise OutcomeError("it has not begun")
    try:
        run = as_stages(read_yaml(RunFolder(folder).config))
        parts = [RunFolder(folder / stage.folder) for stage in run.stages]
        steps = [read_lines(part.steps) for part in parts]
        evaluations = [read_lines(part.evaluations) for part in parts]
    except (ConfigError, OSError, ValueError) as error:
        raise OutcomeError(f"'{folder}' cannot be read: {error}") from error
    wanted = [stage.config.learner.steps for stage in run.stages]
    if not all(is_finished(part.path, count) for part, count in zip(parts, wanted, strict=True)):
        done = sum(len(records) for records in steps)
        raise OutcomeError(f"it is not finished: {done} of {sum(wanted)} steps done")
    trained = _on_one_axis(steps, steps)
    # The first evaluation of a later stage is of the model that the stage before ended with.
    judged = _on_one_axis([evaluations[0], *(part[1:] for part in evaluations[1:])], steps)
    if not judged or any(SCORE not in record["metrics"] for _, record in judged):
        raise OutcomeError(
            "its evaluations have no sampled answers, so it has no held-out reward; set evaluation.answers: samples"
        )
    groups = [stage.config.learner.groups_per_step for stage in run.stages]
    last = judged[-1][1]
    return Outcome(
        method=method,
        seed=seed,
        config=run.stages[-1].config,
        model=run.model,
        heldout=tuple((step, record["metrics"][SCORE]) for step, record in judged),
        final=_final(judged[0][1], last, staged=len(parts) > 1),
        rewards={prompt: sum(each) / len(each) for prompt, each in last.get("rewards", {}).items()},
        training=tuple((step, record["metrics"][SCORE]) for step, record in trained if SCORE in record["metrics"]),
        shares=_shares(trained),
        heldout_prompts=last["prompts"],
        trained_prompts=sum(count * len(done) for count, done in zip(groups, steps, strict=True)),
        tokens=sum(record["metrics"].get("tokens/generated", 0.0) for _, record in trained),
        seconds=sum(record["seconds"].get(phase, 0.0) for _, record in trained for phase in ("wait", "train", "sync")),
    )


def _final(first: Mapping[str, Any], last: Mapping[str, Any], staged: bool) -> dict[str, float]:
    """The measures of the last evaluation, those against the start model taken against the run's own."""
    against_start = _against_start(last, first)
    final = {**against_start, **last["metrics"]}
    if staged:  # what a later stage records of these is against the model that it started from
        final = {name: value for name, value in final.items() if name != "kl/mean"} | against_start
    if {"reference/win", "reference/tie"} <= final.keys():
        final["reference/win_or_tie"] = final["reference/win"] + final["reference/tie"]
    return final


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
