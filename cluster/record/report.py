"""What a person sees while a run goes on and when it ends: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.record.folder import RunFolder
from learner.types import StepReport

BLOCKS = "▁▂▃▄▅▆▇█"


class Report:
    """The console of one run. Use as a context manager."""

    def __init__(self, steps: int, start: int, what: str = "reward", console: Console | None = None) -> None:
        """`what` is the score of a step: 'reward', or 'objective' for training without samples."""
        self._console = console or Console(highlight=False)
        self._steps = steps
        self._what = what
        self._scores: list[float] = []
        self._heldout: list[Mapping[str, Any]] = []
        self._began = time.monotonic()
        self._here = Path.cwd()  # Ray may delete a job's working directory before the last word
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=steps, completed=start)

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def recall(self, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Take in what a resumed run did before, as its files have it."""
        self._scores = [score_of(_with_objective(record["loss"], record["metrics"])) for record in steps]
        self._heldout = list(evaluations)

    def phase(self, text: str) -> None:
        """Say what the run is doing before its first step, or after its last."""
        self._progress.update(self._task, description=text)
        self._line(f"{self._elapsed()}  {text}")

    def note(self, text: str) -> None:
        """One line that stays."""
        self._line(text)

    def step(self, report: StepReport) -> None:
        """One update."""
        metrics = _with_objective(report.loss, report.metrics)
        score = score_of(metrics)
        self._scores.append(score)
        self._progress.update(self._task, completed=report.step, description=f"{self._what} {score:.3f}")
        shares = " ".join(f"{name[:4]} {share:.0%}" for name, share in report.shares.items())
        total = sum(value for phase, value in report.seconds.items() if phase in ("wait", "train", "sync", "evaluate"))
        self._line(
            f"{self._elapsed()}  step {report.step:>4}/{self._steps}  {self._what} {score:6.3f}"
            + (f"  reference {metrics['reward/reference_mean']:6.3f}" if "reward/reference_mean" in metrics else "")
            + f"  terms {shares}  grad {report.grad_norm:8.3g}"
            + (f"  gap {metrics['gap/trained_mean']:.1e}" if "gap/trained_mean" in metrics else "")
            + f"  {total:5.1f} s"
        )

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One evaluation on held-out prompts."""
        self._heldout.append(record)
        name = score_name(record["metrics"]).removesuffix("/mean")
        self._line(f"{self._elapsed()}  held-out {name} after step {record['step']}: {_with_interval(record)}")

    def end(self, folder: RunFolder, checkpoint: str) -> None:
        """The last word of a run that reached its end: results, files, what to do next."""
        self._progress.stop()
        table = Table(show_header=False, box=None, padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        if self._heldout:
            first, last = self._heldout[0], self._heldout[-1]
            name = score_name(last["metrics"]).removesuffix("/mean")
            change = score_of(last["metrics"]) - score_of(first["metrics"])
            table.add_row(f"held-out {name} before", f"{_with_interval(first)}  (step {first['step']})")
            table.add_row(f"held-out {name} after", f"{_with_interval(last)}  (step {last['step']}, {change:+.3f})")
        if self._scores:
            curve = f"{curve_of(self._scores)}  {self._scores[0]:.3f} to {self._scores[-1]:.3f}"
            table.add_row(f"training {self._what} by step", curve)
        table.add_row("exported model", self._shown(folder.model))
        table.add_row("checkpoint", self._shown(checkpoint))
        table.add_row("samples", self._shown(folder.samples))
        table.add_row("metrics", f"{self._shown(folder.steps)}; tensorboard --logdir {self._shown(folder.tensorboard)}")
        table.add_row("went on for", f"{time.monotonic() - self._began:.0f} s")
        command = f"{self._shown(sys.executable)} -m cluster.main resume {self._shown(folder.path)}"
        table.add_row("train further", f"{command} learner.steps={2 * self._steps}")
        self._console.print(table)

    def _shown(self, path: str | Path) -> str:
        """A path as a user would type it here."""
        return str(Path(path).relative_to(self._here) if Path(path).is_relative_to(self._here) else path)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"{seconds // 60:3d}:{seconds % 60:02d}"


def score_name(metrics: Mapping[str, float]) -> str:
    """The one number by which a step or an evaluation is shown: the mean reward, else the objective's value."""
    return "reward/mean" if "reward/mean" in metrics else "objective"


def score_of(metrics: Mapping[str, float]) -> float:
    return metrics[score_name(metrics)]


def _with_interval(record: Mapping[str, Any]) -> str:
    """The score of an evaluation and its 95% interval, which a score that is not finite has not."""
    name, intervals = score_name(record["metrics"]), record["intervals"]
    shown = "[{:.3f}, {:.3f}]".format(*intervals[name]) if name in intervals else ""
    return f"{record['metrics'][name]:.3f} {shown}".rstrip()


def _with_objective(loss: float, metrics: Mapping[str, float]) -> dict[str, float]:
    return {"objective": -loss, **metrics}


def curve_of(values: Sequence[float], width: int = 40) -> str:
    """The values as one line of blocks, averaged to at most `width` of them."""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
