"""The tables of a comparison: what stands in them, as Markdown and as CSV. Pure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.compare.comparison import (
    TERMS,
    Methods,
    Target,
    ablations,
    by_seed,
    configs_of,
    full_grao,
    largest_fall,
    paired,
    sensitivity,
    steps_to,
)
from cluster.compare.outcomes import SCORE, Outcome
from cluster.record.estimates import Estimate, estimate, over_seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How a measure of an evaluation is shown."""

    label: str
    percent: bool = False
    more_is_better: bool = True

    def scaled(self, values: Mapping[int, float]) -> dict[int, float]:
        return {seed: 100 * value if self.percent else value for seed, value in values.items()}


MEASURES = {
    "reference/win": Measure(label="RAS: better than the reference, %", percent=True),
    "reference/win_or_tie": Measure(label="better or as good, %", percent=True),
    "nag/net": Measure(label="NAG: wins less losses against the start model, %", percent=True),
    "nag/rate": Measure(label="NAG as a rate: better than the start model, %", percent=True),
    SCORE: Measure(label="mean reward"),
    "length/mean": Measure(label="answer length, tokens", more_is_better=False),
    "kl/mean": Measure(label="log-ratio to the start model per token", more_is_better=False),
}
"""Of the last evaluation, in the order of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One number of a table with its interval, or words in its place."""

    estimate: Estimate | None = None
    seeds: Mapping[int, float] = field(default_factory=dict)
    """The numbers behind it."""
    words: str = ""
    digits: int = 3

    def __str__(self) -> str:
        if self.estimate is None:
            return self.words
        value, low, high = (
            f"{x:,.{self.digits}f}" for x in (self.estimate.value, self.estimate.low, self.estimate.high)
        )
        return f"{value} [{low}, {high}]" if math.isfinite(self.estimate.high) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows by columns; a cell that is not there is shown as a dash."""

    name: str
    """In the CSV."""
    title: str
    text: str
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    """By (row, column)."""
    best: Mapping[str, str] = field(default_factory=dict)
    """By row: the column that is printed bold."""


def cell(values: Mapping[int, float], digits: int = 3) -> Cell:
    """Mean and t interval over the seeds; a dash for none."""
    return Cell(estimate=over_seeds(list(values.values())) if values else None, seeds=values, words="–", digits=digits)


def scores(methods: Methods) -> Table:
    """The paper's Tables 1 and 2: measures by methods."""
    cells: dict[tuple[str, str], Cell] = {}
    best: dict[str, str] = {}
    for key, measure in MEASURES.items():
        found = {name: cell_of(outcomes, key) for name, outcomes in methods.items()}
        known = {name: one.estimate.value for name, one in found.items() if one.estimate is not None}
        if known:
            cells |= {(measure.label, name): one for name, one in found.items()}
        highest = [name for name, value in known.items() if value == max(known.values())]
        if len(known) > 1 and measure.more_is_better and len(highest) == 1:
            best[measure.label] = highest[0]
    over_prompts = {name: _over_prompts(outcomes) for name, outcomes in methods.items()}
    cells |= {("mean reward, interval over prompts", name): one for name, one in over_prompts.items() if one}
    cells |= {("seeds", name): Cell(words=str(len(outcomes))) for name, outcomes in methods.items()}
    return Table(
        name="scores",
        title="Final scores",
        text="The last evaluation of each run on the held-out prompts (layout of the paper's Tables 1 and 2)."
        " Bold is the highest mean, also where intervals overlap.",
        corner="measure",
        rows=tuple(dict.fromkeys(row for row, _ in cells)),
        columns=tuple(methods),
        cells=cells,
        best=best,
    )


def cell_of(outcomes: Sequence[Outcome], key: str) -> Cell:
    """A measure of the last evaluation over the seeds of one method."""
    return cell(MEASURES[key].scaled(by_seed(outcomes, lambda one: one.final.get(key))), _digits(key))


def speed(methods: Methods, target: Target | None) -> Table:
    """Final score, steps to 90% of the best score, and what they cost."""
    full = full_grao(configs_of(methods))
    cells: dict[tuple[str, str], Cell] = {}
    counts: tuple[tuple[str, Callable[[Outcome], float]], ...] = (
        ("prompts trained", lambda one: one.trained_prompts),
        ("tokens generated", lambda one: one.tokens),
        ("seconds of training", lambda one: one.seconds),
    )
    for name, outcomes in methods.items():
        cells[name, "final score"] = cell_of(outcomes, SCORE)
        if full is not None and name != full:
            cells[name, f"less that of {full}"] = cell(paired(outcomes, methods[full], SCORE))
        if target is not None:
            cells[name, "steps to 90%"] = _steps_cell(outcomes, target)
        cells[name, "largest fall"] = cell(by_seed(outcomes, lambda one: largest_fall(one.heldout)))
        cells |= {(name, what): cell(by_seed(outcomes, count), 0) for what, count in counts}
    columns = ("final score", f"less that of {full}", "steps to 90%", "largest fall", *(what for what, _ in counts))
    return Table(
        name="speed",
        title="Final score and steps to 90% of the best score",
        text=_speed_text(target, full),
        corner="method",
        rows=tuple(methods),
        columns=tuple(column for column in columns if any(column == found for _, found in cells)),
        cells=cells,
    )


def ablation(methods: Methods) -> Table | None:
    """The paper's Table 3; None without a full GRAO and at least one ablation of it."""
    configs = configs_of(methods)
    full = full_grao(configs)
    found = ablations(configs, full) if full is not None else {}
    if full is None or not found:
        return None
    rows = {f"{full} (all terms)": full}
    rows |= {f"without {TERMS[coefficient]} ({coefficient} 0): {name}": name for coefficient, name in found.items()}
    cells: dict[tuple[str, str], Cell] = {}
    for key in ("nag/net", "reference/win", "reference/win_or_tie", SCORE):
        measure = MEASURES[key]
        for row, name in rows.items():
            found_cell = cell_of(methods[name], key)
            if found_cell.estimate is None:
                continue
            cells[row, measure.label] = found_cell
            if name != full and key == SCORE:
                cells[row, "less the full one's"] = cell(paired(methods[name], methods[full], key))
    return Table(
        name="ablation",
        title="Ablation",
        text="GRAO without one of its terms (layout of the paper's Table 3).",
        corner="method",
        rows=tuple(rows),
        columns=tuple(dict.fromkeys(column for _, column in cells)),
        cells=cells,
    )


def shares(methods: Methods) -> Table | None:
    """The paper's Fig. 5 in numbers: the terms' shares of the loss in each third of training, of the full GRAO."""
    name = full_grao(configs_of(methods))
    if name is None:
        return None
    thirds = ("first third", "second third", "last third")
    cells = {}
    for term in methods[name][0].shares:
        for number, third in enumerate(thirds):
            found = {one.seed: _third(one, term, number) for one in methods[name]}
            cells[term, third] = cell({seed: 100 * share for seed, share in found.items() if share is not None}, 1)
    return Table(
        name="shares",
        title=f"Share of each term of {name}",
        text="Size of the term over the sum of the sizes of all three, in %, mean over the steps (the paper's Fig. 5).",
        corner="term",
        rows=tuple(methods[name][0].shares),
        columns=thirds,
        cells=cells,
    )


def sensitivities(methods: Methods) -> list[Table]:
    """Score against beta and against lambda, for each of which there are three values or more."""
    tables = []
    for coefficient in ("beta", "lambda"):
        found = sensitivity(configs_of(methods), coefficient)
        if not found:
            continue
        keys = [key for key in MEASURES if any(key in one.final for name in found.values() for one in methods[name])]
        cells = {
            (f"{value:g}", MEASURES[key].label): cell_of(methods[name], key)
            for value, name in found.items()
            for key in keys
        }
        tables.append(
            Table(
                name=f"sensitivity to {coefficient}",
                title=f"Sensitivity to {coefficient}",
                text=f"Methods that differ in {coefficient} alone: {', '.join(found.values())}.",
                corner=coefficient,
                rows=tuple(f"{value:g}" for value in found),
                columns=tuple(MEASURES[key].label for key in keys),
                cells=cells,
            )
        )
    return tables


def markdown(table: Table) -> str:
    """The table with its title and text."""
    lines = [f"## {table.title}", "", table.text, ""]
    lines += [_line([table.corner, *table.columns]), _line(["---"] * (len(table.columns) + 1))]
    for row in table.rows:
        shown = [(str(table.cells.get((row, column), "–")), column == table.best.get(row)) for column in table.columns]
        lines.append(_line([row, *(f"**{text}**" if bold else text for text, bold in shown)]))
    return "\n".join([*lines, ""])


def as_csv(tables: Sequence[Table]) -> str:
    """Every cell as one line: table, row, column, mean, low, high, number of seeds, words, one number by seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "row", "column", "mean", "low", "high", "seeds", "words", "by_seed"])
    for table in tables:
        for row in table.rows:
            for column in table.columns:
                one = table.cells.get((row, column))
                if one is not None:
                    writer.writerow([table.name, row, column, *_numbers(one)])
    return out.getvalue()


def _numbers(one: Cell) -> list[str]:
    values = ["", "", ""]
    if one.estimate is not None:
        found = (one.estimate.value, one.estimate.low, one.estimate.high)
        values = [repr(value) if math.isfinite(value) else "" for value in found]
    words = one.words if one.estimate is None else ""
    return [*values, str(len(one.seeds)), words, " ".join(f"{seed}:{value!r}" for seed, value in one.seeds.items())]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _digits(key: str) -> int:
    return 1 if MEASURES[key].percent or key == "length/mean" else 3


def _over_prompts(outcomes: Sequence[Outcome]) -> Cell | None:
    """Of the mean over seeds by prompt; None where the seeds do not share their prompts."""
    prompts = outcomes[0].rewards.keys()
    if not prompts or any(one.rewards.keys() != prompts for one in outcomes):
        return None
    means = [sum(one.rewards[prompt] for one in outcomes) / len(outcomes) for prompt in prompts]
    return Cell(estimate=estimate(means))


def _steps_cell(outcomes: Sequence[Outcome], target: Target) -> Cell:
    """A mean only where every seed reached the target: the mean of those that did would flatter."""
    found = by_seed(outcomes, lambda one: steps_to(one, target))
    if len(found) == len(outcomes):
        return cell(found, 1)
    reached = f": {', '.join(f'{steps:g}' for steps in sorted(found.values()))}" if found else ""
    return Cell(seeds=found, words=f"reached by {len(found)} of {len(outcomes)}{reached}")


def _speed_text(target: Target | None, full: str | None) -> str:
    about = "Score is the mean reward on the held-out prompts."
    if full is not None:
        about += f" Differences to {full} are taken seed by seed."
    if target is None:
        return f"{about} No method was better than the start model, so there is no best score to reach 90% of."
    return (
        f"{about} The best score, as a mean over seeds, is {target.best:.3f} ({target.method}, step {target.step});"
        f" the start model has {target.start:.3f}, so 90% of the way is {target.value:.3f}. Counted is the first"
        " evaluated step at which a run's score is there."
    )


def _third(outcome: Outcome, term: str, number: int) -> float | None:
    curve = outcome.shares.get(term, ())
    low, high = (len(curve) * edge // 3 for edge in (number, number + 1))
    values = [share for _, share in curve[low:high]]
    return sum(values) / len(values) if values else None
