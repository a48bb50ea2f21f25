"""Rows of a data set as plain mappings, values as text or JSON, and the two errors of the data. Reads no file."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any


class _OneLineError(ValueError):
    """Quotes names and values out of the data, which may hold line breaks and control codes: shown as escapes."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class DataError(_OneLineError):
    """Data that a run cannot use. One line that names the field (or the row) and the fix."""


class RowError(_OneLineError):
    """Why one row is bad. One line."""


Row = Mapping[str, Any] | RowError
"""A row of the source, or why it could not even be read."""


class Spelled(float):
    """A number out of a JSON text that remembers how it is written there, e.g. 1.50 or 1e3."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Spelled:
        made = super().__new__(cls, text)
        made.text = text
        return made


class Unreadable:
    """Stands for a value that the file's reader could not turn into one of Python's, and says why."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


def number_text(value: Any) -> str | None:
    """A number or truth value as text, None for anything else.

    As the file writes it where that is known (JSON), else the shortest decimal that reads back to the same number,
    without '.0': files of typed columns make 5.0 of 5 as soon as one row has none. NaN has no text.
    """
    if isinstance(value, Spelled):
        return value.text
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return "true" if value else "false"
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Decimal):
        return str(value)
    if not isinstance(value, Real) or isinstance(value, Fraction) or not math.isfinite(value):
        return None
    shortest = Decimal(str(value))
    if shortest and not 1e-6 <= abs(shortest) < 1e16:
        return str(value)
    whole = shortest == shortest.to_integral_value()
    return format(shortest.to_integral_value() if whole else shortest.normalize(), "f")


def is_nothing(value: Any) -> bool:
    """Whether a value stands for none: null, or the NaN that tables have in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_json(value: Any) -> Any:
    """The value with JSON types only: sequences become lists, dates, fractions and numpy scalars what they print as.

    NaN and infinities become None. Raises RowError for what has no such form, e.g. bytes.
    """
    if isinstance(value, str):
        return as_unicode(value, "a value")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {as_json(str(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [as_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((as_json(item) for item in value), key=repr)
    if isinstance(value, date | time | timedelta | Decimal | Fraction | complex):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return as_json(value.tolist())
    raise RowError(f"a value is of type {type(value).__name__}, which JSON cannot hold")


def json_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns whose values JSON can hold. The others (bytes, images, broken text) are left out: nobody asked
    for them, so they must not cost a row."""
    kept = {}
    for name, value in row.items():
        try:
            kept[as_unicode(str(name), "a name")] = as_json(value)
        except (RowError, RecursionError):
            kept.pop(name, None)
    return kept


def as_unicode(text: str, what: str) -> str:
    """The text itself. Raises RowError where it holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"character {error.start} of {what} is not valid Unicode") from error
    return text


def nearest(name: str, known: Sequence[str]) -> str:
    """'; did you mean X?' or, where nothing is close, nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def one_line(error: BaseException) -> str:
    """Kind and text of an error on one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text[:300]}"
