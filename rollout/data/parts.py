"""Which rows of which source are trained on, and which are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs.data import DataConfig, DataSource
from rollout.data.fields import guess, is_there
from rollout.data.generators import generate_rows, generator_seed
from rollout.data.layouts import detect_layout
from rollout.data.order import apportion
from rollout.data.rows import DataError, Row, RowError, nearest
from rollout.data.sources import read_rows

DEFAULT_GENERATED_ROWS = 1024
"""Rows of a generator where data.train_rows is null: a generator has no end of its own."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows for training, or held-out rows, of one source."""

    field: str
    """The config field that names the source: the last rows of data.train may be held out."""
    source: DataSource
    layout: str
    rows: Mapping[int, Row]
    """By row number."""
    heldout: bool

    @property
    def columns(self) -> Mapping[str, str | None]:
        return {} if self.source.generated else self.source.columns or {}


def parts_of(data: DataConfig, seed: int) -> tuple[list[Part], list[Part]]:
    """The training and the held-out parts."""
    sources = data.train_sources
    named = data.heldout_sources if data.heldout_rows else {}
    rows = {
        field: _read(data, field, source, f"train {seed}", number, source.rows)
        for number, (field, source) in enumerate(sources.items())
    }
    layouts = {field: _layout(field, source, rows[field]) for field, source in sources.items()}
    cut = dict.fromkeys(sources, 0)
    if data.heldout is None and data.heldout_rows:
        weights = [source.weight or len(rows[field]) for field, source in sources.items()]
        cut = dict(zip(sources, apportion(data.heldout_rows, weights), strict=True))
    train, heldout = [], []
    for number, (field, source) in enumerate(sources.items()):
        last = range(len(rows[field]) - (0 if source.generated else cut[field]), len(rows[field]))
        if last.start <= 0:
            fix = f"but {field} has {len(rows[field])} rows; lower it or name data.heldout"
            raise DataError(f"data.heldout_rows is {data.heldout_rows}, {fix}")
        kept = range(last.start)[: source.rows]
        train.append(Part(field, source, layouts[field], {row: rows[field][row] for row in kept}, False))
        if source.generated and cut[field]:
            of_its_own = field.replace("data.train", "data.heldout")
            made = _read(data, of_its_own, source, "heldout", number, cut[field])
            heldout.append(Part(of_its_own, source, layouts[field], dict(enumerate(made)), True))
        elif last:
            heldout.append(Part(field, source, layouts[field], {row: rows[field][row] for row in last}, True))
    counts = apportion(data.heldout_rows, [source.weight or 1 for source in named.values()]) if named else []
    for number, ((field, source), count) in enumerate(zip(named.items(), counts, strict=True)):
        other = _read(data, field, source, "heldout", number, count)[: min(count, source.rows or count)]
        heldout.append(Part(field, source, _layout(field, source, other), dict(enumerate(other)), True))
    return train, heldout


def _read(data: DataConfig, field: str, source: DataSource, part: str, number: int, count: int | None) -> list[Row]:
    """The rows of a source; of a generator `count`, from a seed that differs by part and by the source's number."""
    if not source.generated:
        return read_rows(field, source)
    count = count or DEFAULT_GENERATED_ROWS
    seed = generator_seed(f"{part} {number}" if number else part)
    worse = data.rejected == "other_rows"
    return generate_rows(field, source.path, source.generator or {}, seed, count, worse)


def _layout(field: str, source: DataSource, rows: Sequence[Row]) -> str:
    """The layout of the config, or the one that fits the first row which fits any. Raises DataError."""
    if source.generated:
        return "reasoning_gym"
    readable = [row for row in rows if not isinstance(row, RowError)]
    columns = source.columns or {}
    for name, path in columns.items() if readable else ():
        if path is not None and not any(is_there(row, path) for row in readable):
            hint = nearest(path, list(readable[0])) or f"; the first has {', '.join(map(str, readable[0]))}"
            raise DataError(f"{_beside(field, 'columns')}.{name}: no row has a column '{path}'{hint}")
    if source.layout not in (None, "auto"):
        return str(source.layout)
    found = next((layout for row in readable if (layout := detect_layout(row, columns)) is not None), None)
    if found is None and readable:
        names = [str(name) for name in readable[0]]
        question, answer = guess("question", names) or "...", guess("answer", names) or "..."
        raise DataError(
            f"{field}: columns {', '.join(names)} fit no layout; say which column is what by"
            f" {_beside(field, 'columns')}: {{question: {question}, answer: {answer}}} (all layouts: docs/data.md)"
        )
    if found is None:
        raise DataError(f"{field}: all {len(rows)} rows are bad; row 0: {rows[0]}")
    return found


def _beside(field: str, setting: str) -> str:
    """The setting for a source: its own where it is one of several."""
    return f"{field}.{setting}" if field.count(".") > 1 else f"data.{setting}"
