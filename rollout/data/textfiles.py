"""Rows of text files: JSON lines, one JSON list, comma or tab separated values. Each also packed with gzip."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from rollout.data.rows import DataError, Row, RowError, Spelled, one_line

_PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TEXT_SUFFIXES = tuple(suffix + packed for suffix in _PLAIN for packed in ("", ".gz"))
LONGEST_VALUE = 1 << 28
"""Characters in one value of a .csv file."""


def read_text_rows(field: str, path: Path) -> list[Row]:
    """The rows of a file with one of TEXT_SUFFIXES; blank lines are none. Raises DataError where it cannot be read."""
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            data = cast(BinaryIO, file).read().removeprefix(b"\xef\xbb\xbf")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{field}: '{path}' cannot be read ({one_line(error)}); write it again") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{field}: '{path}' is UTF-16; write it as UTF-8")
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind in ("csv", "tsv"):
        return _separated(field, path, data, "\t" if kind == "tsv" else ",")
    listed = _listed(data, alone=kind == "json")
    if listed is not None:
        return listed
    rows = [_parse_line(line) for line in data.split(b"\n") if line.strip()]
    if len(rows) > 1 and all(isinstance(row, RowError) for row in rows):
        return _refused_as_a_whole(field, path, data, rows)
    return rows


def _refused_as_a_whole(field: str, path: Path, data: bytes, rows: list[Row]) -> list[Row]:
    """No line is a row: say so where the file as a whole is JSON of another shape."""
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        return rows
    what = f"an object with {', '.join(map(repr, list(whole)[:5]))}" if isinstance(whole, dict) else "one value"
    raise DataError(f"{field}: '{path}' holds {what}; write its rows as a list, or one object a line")


def _listed(data: bytes, alone: bool) -> list[Row] | None:
    """The rows of a file that is one JSON list of objects, as it is or as the only value of an object.

    alone: the name of the file says that it holds one value; else a list counts only where it takes several lines,
    because one line is one row.
    """
    start = data.lstrip()[:1]
    if start not in (b"[", b"{") or not (alone or (start == b"[" and data.strip().count(b"\n"))):
        return None
    try:
        whole = _loads(data.decode())
    except (ValueError, RecursionError):
        return None
    if isinstance(whole, dict):
        inside = [value for value in whole.values() if isinstance(value, list) and value]
        whole = inside[0] if len(whole) == len(inside) == 1 and isinstance(inside[0][0], dict) else None
    return [_row(item, "the list") for item in whole] if isinstance(whole, list) else None


def _parse_line(line: bytes) -> Row:
    try:
        return _row(_loads(line.decode()), "the line")
    except UnicodeDecodeError as error:
        return RowError(f"byte {error.start} is not valid UTF-8")
    except (ValueError, RecursionError) as error:
        return RowError(f"the line is not valid JSON ({_hint(line.decode().strip()) or one_line(error)})")


def _hint(line: str) -> str:
    """What is wrong with a line in words, where it is one of the usual mistakes."""
    if line.endswith(",") and _is_json(line[:-1]):
        return "it ends with a comma; one object a line needs none"
    if re.search(r",\s*[}\]]", line) and _is_json(re.sub(r",(\s*[}\]])", r"\1", line)):
        return "there is a comma before a closing bracket"
    if re.match(r"\{\s*'", line):
        return "it is Python, not JSON: names and texts stand in double quotes; write it with json.dumps"
    return ""


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _loads(text: str) -> Any:
    return json.loads(text, parse_float=Spelled)


def _row(value: Any, where: str) -> Row:
    return value if isinstance(value, dict) else RowError(f"{where} holds a {type(value).__name__}, not an object")


def _separated(field: str, path: Path, data: bytes, delimiter: str) -> list[Row]:
    """Rows by the names in the first line. All values are text; an empty one is null."""
    try:
        text = data.decode()
        csv.field_size_limit(LONGEST_VALUE)
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if line]
    except (ValueError, csv.Error) as error:
        raise DataError(f"{field}: '{path}' cannot be read ({one_line(error)}); write it again") from error
    if not lines:
        return []
    names = lines[0]
    return [
        {name: value or None for name, value in zip(names, values, strict=True)}
        if len(values) == len(names)
        else RowError(f"it has {len(values)} values, the first line names {len(names)}")
        for values in lines[1:]
    ]
