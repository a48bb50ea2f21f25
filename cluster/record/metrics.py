"""One StepReport out of what all ranks returned, and the files in which a run tells what happened.

Every line of a .jsonl file is strict JSON with a 'step'. A number that is not finite is left out, and its name stands
under 'not_finite'. docs/metrics.md has the meaning of every name.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from cluster.record import measures
from cluster.record.files import describe, sync
from cluster.record.folder import RunFolder
from learner.objectives.interface import Objective
from learner.types import RankReport, RowResult, StepReport
from reward.types import ScoredGroup


class MetricsError(RuntimeError):
    """Reports that do not fit together, or a file of results that cannot be written. One line."""


def step_report(
    step: int,
    groups: Sequence[ScoredGroup],
    reports: Sequence[RankReport],
    objective: Objective,
    seconds: Mapping[str, float],
) -> StepReport:
    """Merge the ranks' reports of the update that made version `step`.

    `seconds` are the driver's phases; of the ranks' own phases the slowest rank's time counts. Raises MetricsError
    unless every trained row was computed by exactly one rank.
    """
    rows = objective.rows(groups)
    results = _by_row(step, reports, len(rows))
    terms = objective.terms(groups, rows, results)
    magnitude = sum(abs(term) for term in terms.values())
    return StepReport(
        step=step,
        loss=-math.fsum(result.gain - result.penalty for result in results.values()),
        terms=terms,
        shares={name: abs(term) / magnitude if magnitude else 0.0 for name, term in terms.items()},
        grad_norm=reports[0].grad_norm,
        learning_rate=reports[0].learning_rate,
        metrics={
            **measures.of_samples(groups, step - 1, objective),
            **measures.forward(rows, results, sampled=bool(groups[0].group.samples)),
            **(objective.metrics(rows, results) if rows else {}),
            **measures.critic(reports),
            **measures.work(groups, reports),
        },
        seconds={**_slowest([report.seconds for report in reports]), **seconds},
    )


def sample_record(step: int, scored: ScoredGroup, objective: Objective) -> dict[str, Any]:
    """One trained group for samples.jsonl: prompt, reference, and every answer with all that decided its weight."""
    advantages = objective.advantages(scored)
    prompt = scored.group.prompt
    answers = [
        {
            "text": sample.text,
            "reward": scored.rewards[index],
            "rewards": {name: part.samples[index] for name, part in scored.breakdown.items()},
            **({"advantage": advantages.samples[index]} if advantages.samples else {}),
            "first_version": sample.first_version,
            "last_version": sample.last_version,
            "finish": sample.finish,
            "tokens": len(sample.token_ids),
        }
        for index, sample in enumerate(scored.group.samples)
    ]
    reference = {
        "text": prompt.reference_text,
        "reward": scored.reference_reward,
        "rewards": {name: part.reference for name, part in scored.breakdown.items()},
        "advantage": advantages.reference,
        "tokens": len(prompt.reference_ids),
    }
    return {
        "step": step,
        "id": prompt.id,
        "prompt": prompt.text,
        "reference": reference if prompt.has_reference else None,
        "answers": answers,
    }


class MetricsWriter:
    """Appends to the run's files; every line is with the operating system when a method returns."""

    def __init__(self, folder: RunFolder) -> None:
        """Open the files, or make them. Raises MetricsError."""
        try:
            self._steps = folder.steps.open("ab", buffering=0)
            self._samples = folder.samples.open("ab", buffering=0)
            self._evaluations = folder.evaluations.open("ab", buffering=0)
            folder.tensorboard.mkdir(exist_ok=True)
            self._events = _open_events(folder.tensorboard)
        except OSError as error:
            raise MetricsError(f"run.folder: '{error.filename}' cannot be written: {describe(error)}") from error
        self._event_writer = RecordWriter(self._events)
        # TensorBoard hides what an earlier process logged from this step on: the run went on from a checkpoint.
        first = _last_step(folder.steps) + 1
        self._event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._event(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))

    def step(self, report: StepReport) -> None:
        """One update into steps.jsonl and TensorBoard. Raises MetricsError."""
        record = {
            "step": report.step,
            "loss": report.loss,
            "terms": report.terms,
            "shares": report.shares,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "metrics": report.metrics,
            "seconds": report.seconds,
        }
        _append(self._steps, record)
        self._scalars(report.step, _flat({**record, "metrics": {}}) | dict(report.metrics))

    def samples(self, step: int, groups: Sequence[ScoredGroup], objective: Objective) -> None:
        """The trained groups into samples.jsonl. Raises MetricsError."""
        for group in groups:
            _append(self._samples, sample_record(step, group, objective))

    def evaluation(self, step: int, record: Mapping[str, Any]) -> None:
        """One evaluation into evaluations.jsonl and TensorBoard. Raises MetricsError."""
        _append(self._evaluations, record)
        self._scalars(step, {f"evaluation/{name}": value for name, value in record["metrics"].items()})

    def close(self) -> None:
        for file in (self._steps, self._samples, self._evaluations, self._events):
            file.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        finite = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if math.isfinite(value)]
        self._event(Event(wall_time=time.time(), step=step, summary=Summary(value=finite)))

    def _event(self, event: Event) -> None:
        try:
            self._event_writer.write(event.SerializeToString())
        except OSError as error:
            raise MetricsError(f"run.folder: '{self._events.name}' cannot be written: {describe(error)}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of one of the run's .jsonl files; none where it does not exist yet. Raises OSError."""
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What `cut_after` took out of a file."""

    later: int
    """Lines of steps after the one that the run goes on from."""
    torn: int
    """Lines that are not whole JSON with a step, as a kill while writing leaves them."""


def cut_after(path: Path, step: int) -> Cut:
    """Drop the lines of a .jsonl file whose 'step' is above `step`, and torn ones, in one move.

    A file that does not exist, or has nothing to drop, stays as it is. Raises OSError.
    """
    if not path.exists():
        return Cut(later=0, torn=0)
    later = torn = 0
    draft = path.with_name(f".{path.name}.writing")
    with path.open("rb") as old, draft.open("wb") as new:
        for line in old:
            at = _step_of(line)
            if at is None:
                torn += 1
            elif at > step:
                later += 1
            else:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    if later or torn:
        draft.replace(path)
        sync(path.parent)
    else:
        draft.unlink()
    return Cut(later=later, torn=torn)


def _step_of(line: bytes) -> int | None:
    """The step of a whole line; None for a torn one (a line is written with its end, so no end means torn)."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record["step"] if isinstance(record, dict) and "step" in record else None
    return step if isinstance(step, int) else None


def _last_step(path: Path) -> int:
    """The step of the last line, 0 for an empty file."""
    last = 0
    with path.open("rb") as lines:
        for line in lines:
            last = _step_of(line) or last
    return last


def _by_row(step: int, reports: Sequence[RankReport], count: int) -> dict[int, RowResult]:
    results: dict[int, RowResult] = {}
    for report in reports:
        for result in report.rows:
            if result.row in results:
                raise MetricsError(f"step {step}: row {result.row} was computed twice, last by rank {report.rank}")
            results[result.row] = result
    if results.keys() != set(range(count)):
        wrong = sorted(results.keys() ^ set(range(count)))[0]
        raise MetricsError(f"step {step}: row {wrong} of {count} was {'not' if wrong < count else 'wrongly'} computed")
    return results


def _slowest(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    phases = dict.fromkeys(phase for each in times for phase in each)
    return {phase: max(each[phase] for each in times if phase in each) for phase in phases}


def _open_events(folder: Path) -> FileIO:
    # TensorBoard reads files with 'tfevents' in their name, in the order of the number after it.
    return (folder / f"events.out.tfevents.{time.time_ns() // 1000:017d}.{os.getpid()}").open("ab", buffering=0)


def _append(file: FileIO, record: Mapping[str, Any]) -> None:
    """One line in one write, so that a kill tears at most the last line."""
    strict, lost = _finite(record)
    line = json.dumps(strict if not lost else {**strict, "not_finite": lost}, ensure_ascii=False, allow_nan=False)
    # A lone surrogate in a text has no UTF-8 form; Python's escape for it is JSON's too.
    data = line.encode("utf-8", errors="backslashreplace") + b"\n"
    try:
        written = file.write(data)
    except OSError as error:
        raise MetricsError(f"run.folder: '{file.name}' cannot be written: {describe(error)}") from error
    if written != len(data):
        raise MetricsError(f"run.folder: '{file.name}' cannot be written: no space left on device")


def _finite(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The record without its non-finite numbers, and their names, e.g. 'metrics/gap/trained_mean'."""
    kept: dict[str, Any] = {}
    lost: list[str] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            kept[name], inside = _finite(value)
            lost += [f"{name}/{inner}" for inner in inside]
        elif isinstance(value, float) and not math.isfinite(value):
            lost.append(name)
        else:
            kept[name] = value
    return kept, lost


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """Scalars by 'section/name'; the step itself is the axis, not a value."""
    values: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            values |= {f"{name}/{inner}": number for inner, number in value.items()}
        elif name != "step":
            values[name] = value
    return values
