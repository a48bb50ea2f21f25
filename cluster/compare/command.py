"""`grao compare`: methods x seeds, each run in a process of its own, one or several at once, then the report.

OUT/
    NAME/seed-K/        the run folder of a method and a seed
    NAME/seed-K.yaml    the config that it was started with
    NAME/seed-K.log     what it printed, all tries one after the other
    report/             results.md, results.csv, figures
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.compare.outcomes import OutcomeError, read_outcome, steps_done
from cluster.compare.report import gather, write_report
from cluster.compare.trials import Trial, check_startable
from cluster.record.files import write_whole
from cluster.record.folder import RunFolder, RunFolderError
from cluster.run.signals import cancel_on_signals

POLL_S = 1.0


class ComparisonError(RuntimeError):
    """Runs of a comparison that failed, or a comparison that cannot start. One line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How runs are made."""

    at_once: int = 1
    """Runs at the same time."""
    drop_checkpoints: bool = False
    """Delete a run's checkpoints once its model is exported."""


async def compare_methods(trials: Sequence[Trial], out: Path, command: str, manner: Manner) -> None:
    """Run what is not finished, then report. `command` is shown in the report.

    Raises ComparisonError, after the report, where runs failed; and whatever can be refused before the first run.
    """
    cancel_on_signals()
    lock = RunFolder(out)
    try:
        lock.lock()
    except RunFolderError as error:
        raise ComparisonError(f"--out: {error}") from error
    try:
        check_startable(trials)
        failed = await _run_all(trials, manner)
    finally:
        lock.unlock()
    if len(failed) < len(trials):
        report(trials, out, command)
    if failed:
        causes = "; ".join(f"{name}: {cause}" for name, cause in failed.items())
        raise ComparisonError(f"{len(failed)} of {len(trials)} runs failed: {causes}")


def report(trials: Sequence[Trial], out: Path, command: str) -> None:
    """Write the report of the runs that are finished. Raises OutcomeError where none is."""
    gathered = gather({(trial.method, trial.seed): trial.folder for trial in trials})
    folder = out / "report"
    table = write_report(gathered, command, folder)
    console = Console(highlight=False)
    missing = (f"not in the tables: {line}" for line in gathered.missing)
    for line in (table, *missing, f"report: {folder / 'results.md'}"):
        console.print(line, markup=False, soft_wrap=True)


async def _run_all(trials: Sequence[Trial], manner: Manner) -> dict[str, str]:
    """The causes of the runs that failed, by name."""
    failed: dict[str, str] = {}
    console = Console(highlight=False)
    gate = asyncio.Semaphore(manner.at_once)  # lets in who came first
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*shown, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(trials))

        async def turn(number: int, trial: Trial) -> None:
            async with gate:
                try:
                    said = await _result(trial, manner, lambda text: progress.update(task, description=text))
                except (ComparisonError, OutcomeError, RunFolderError) as error:
                    failed[trial.name] = str(error)
                    said = f"failed: {error}"
            console.print(f"{number:>3}/{len(trials)}  {trial.name}: {said}", markup=False, soft_wrap=True)
            progress.advance(task)

        async with asyncio.TaskGroup() as turns:
            # all methods of a seed before the next seed: whatever is done at any time can be compared
            for number, trial in enumerate(sorted(trials, key=lambda one: one.seed), start=1):
                turns.create_task(turn(number, trial))
    return failed


async def _result(trial: Trial, manner: Manner, say: Callable[[str], None]) -> str:
    """Bring a run to its end if it is not there yet; its score in words."""
    began, state = time.monotonic(), trial.state()
    if state != "finished":
        await _run(trial, state, say)
    score = read_outcome(trial.method, trial.seed, trial.folder).heldout[-1][1]
    if manner.drop_checkpoints:
        _drop_checkpoints(trial)
    return f"held-out reward {score:.3f}, {'was finished' if state == 'finished' else _elapsed(began)}"


async def _run(trial: Trial, state: Literal["new", "begun"], say: Callable[[str], None]) -> None:
    """Start a run, or go on with it. Raises ComparisonError where it does not reach its end."""
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    # from this file, not the user's, which may be edited before the last run starts hours later
    write_whole(trial.beside("yaml"), trial.run.text)
    log = trial.beside("log")
    before = log.stat().st_size if log.exists() else 0
    if state == "begun":
        arguments = ["resume", str(trial.folder)]
    else:
        _clear(RunFolder(trial.folder))
        arguments = ["train", str(trial.beside("yaml"))]
    code = await _child(arguments, log, lambda: say(f"{trial.name}, step {sum(map(steps_done, trial.places))}"))
    if code:
        raise ComparisonError(f"{_cause(log, before, code)} (more in {log})")


async def _child(arguments: Sequence[str], log: Path, tick: Callable[[], None]) -> int:
    """Run `grao` with its output into a file, to its end and never beyond that of the caller; its exit status."""
    with log.open("ab") as sink:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cluster.main", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C reaches the caller alone, which passes one signal on
        )
    ended = asyncio.ensure_future(child.wait())
    try:
        while not ended.done():
            tick()
            await asyncio.wait([ended], timeout=POLL_S)
    finally:
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):  # it ended this instant
                child.terminate()
            await asyncio.wait([ended])
    return ended.result()


def _cause(log: Path, before: int, code: int) -> str:
    """The error line of the try whose output starts at `before`, else its last line."""
    with log.open("rb") as file:
        file.seek(before)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = (errors or lines)[-1:]
    return last[0] if last else f"it ended with status {code} and said nothing"


def _clear(folder: RunFolder) -> None:
    """Empty a folder whose run has no checkpoint to go on from. Raises RunFolderError where it is in use."""
    folder.lock()
    try:
        for path in folder.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "run.lock":  # held; and others may wait for it
                path.unlink()
    finally:
        folder.unlock()


def _drop_checkpoints(trial: Trial) -> None:
    for place in trial.places:
        if RunFolder(place).checkpoints.is_dir():
            shutil.rmtree(RunFolder(place).checkpoints)


def _elapsed(began: float) -> str:
    seconds = int(time.monotonic() - began)
    return f"{seconds // 60}:{seconds % 60:02d} min"
