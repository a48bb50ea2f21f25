"""Rows of a data set as plain mappings, from files, saved folders, the hub or a reasoning-gym generator."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, cast

GENERATOR = "reasoning_gym:"
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(/(?P<folder>\w[\w./-]*))?(:(?P<config>[\w.-]+))?")


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


def read_rows(field: str, source: str, split: str) -> list[Row]:
    """Every row of a file, a saved data set folder or a hub data set, in order; list index = row number.

    field: the config field that names the source, for messages.
    source: a hub name is 'owner/name', with '/folder' for a part of it and ':config' for one of its configurations.
    split: used where the source has splits; a file has none.
    JSON lines are read here and not by `datasets`: its JSON builder gives up a whole file for one broken line, and
    turns answers that look like dates into dates. Raises DataError.
    """
    path = Path(source).expanduser()
    if not path.exists() and (source.endswith(SUFFIXES) or not _HUB_NAME.fullmatch(source)):
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{field}: '{source}' does not exist{nearest(path.name, siblings)}")
    if path.is_file() and not source.endswith(SUFFIXES):
        raise DataError(f"{field}: '{source}' is of no known kind; use a file that ends in {', '.join(SUFFIXES)}")
    json_lines = path.is_file() and not source.endswith(".parquet")
    rows = _read_json_lines(field, path) if json_lines else list(_read_with_datasets(field, source, split))
    if not rows:
        raise DataError(f"{field}: '{source}' has no rows; name a data set that has some")
    return rows


def generate_rows(
    field: str, source: str, options: Mapping[str, Any], seed: int, count: int, with_rejected: bool = False
) -> list[Row]:
    """`count` rows of 'reasoning_gym:<generator>', the same for the same arguments.

    A row has `question`, `answer` and `reasoning_gym`: {"generator", "options", "seed", "entry"}, from which
    `create_dataset(generator, **options).score_answer(text, entry)` scores an answer. `with_rejected` adds `rejected`:
    the next row's answer that scores lower than the row's own. Raises DataError.
    """
    import reasoning_gym

    name = source.removeprefix(GENERATOR)
    _check_options(field, name, options)
    try:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=count, **options)
        entries = [dataset[index] for index in range(count)]
    except Exception as error:  # generators check their options by assert or not at all
        raise DataError(f"data.generator: '{name}' refuses {dict(options)}: {one_line(error)}") from error
    try:  # the reward gets the entry as JSON, and a few verifiers need e.g. a tuple to stay a tuple
        scores = [dataset.score_answer(entry["answer"], entry) for entry in (entries[0], as_json(entries[0]))]
    except Exception as error:
        raise DataError(f"{field}: the verifier of '{name}' fails on its own answer: {one_line(error)}") from error
    if scores[0] != scores[1]:
        raise DataError(f"{field}: the verifier of '{name}' needs values that JSON cannot hold; take another generator")
    origin = {"generator": name, "options": dict(options), "seed": seed}
    rows: list[Row] = []
    for number, entry in enumerate(entries):
        worse = {"rejected": _worse_answer(field, name, dataset, entries, number)} if with_rejected else {}
        row = {"question": entry["question"], "answer": entry["answer"], **worse}
        rows.append({**row, "reasoning_gym": {**origin, "entry": entry}})
    return rows


def _worse_answer(field: str, name: str, dataset: Any, entries: Sequence[Mapping[str, Any]], number: int) -> str:
    """The answer of the first row after `number`, going round, that its verifier scores lower than its own."""
    entry = entries[number]
    try:
        own = dataset.score_answer(entry["answer"], entry)
        for step in range(1, len(entries)):
            other = entries[(number + step) % len(entries)]["answer"]
            if dataset.score_answer(other, entry) < own:
                return str(other)
    except Exception as error:  # a verifier may stumble over an answer to another question
        raise DataError(
            f"data.rejected: the verifier of '{name}' fails on the answer of another row ({one_line(error)}); set it"
            " to given"
        ) from error
    raise DataError(
        f"data.rejected: no row of '{name}' has an answer that is wrong for row {number}; raise data.train_rows or"
        f" vary data.generator ({field})"
    )


def _check_options(field: str, name: str, options: Mapping[str, Any]) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise DataError(f"{field}: reasoning-gym has no generator '{name}'{nearest(name, list(DATASETS))}")
    known = list(DATASETS[name][1].__dataclass_fields__)
    for option in options:
        if option in ("seed", "size"):
            fix = "data.train_rows and data.heldout_rows" if option == "size" else "run.seed"
            raise DataError(f"data.generator.{option}: remove it and set {fix}")
        if option not in known:
            raise DataError(f"data.generator.{option}: '{name}' has no such option{nearest(option, known)}")


def generator_seed(part: str) -> int:
    """Seed of a generated part. Derived by a hash, because a generator's row i uses seed + i: near seeds share rows."""
    return int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "big") >> 1


def as_json(value: Any) -> Any:
    """The value with JSON types only: sequences become lists, dates, fractions and numpy scalars what they print as.

    NaN and infinities become None. Raises RowError for what has no such form, e.g. bytes.
    """
    if isinstance(value, str):
        return as_unicode(value, "a value")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {as_json(str(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [as_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((as_json(item) for item in value), key=repr)
    if isinstance(value, date | time | Decimal | Fraction | complex):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return as_json(value.tolist())
    raise RowError(f"a value is of type {type(value).__name__}, which JSON cannot hold")


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


def _read_json_lines(field: str, path: Path) -> list[Row]:
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            lines = cast(BinaryIO, file).read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{field}: '{path}' cannot be read ({one_line(error)}); write it again") from error
    while lines and not lines[-1].strip():
        lines.pop()  # what follows the last row is no row
    return [_parse_line(line) for line in lines]


def _parse_line(line: bytes) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RowError(f"byte {error.start} is not valid UTF-8")
    except (ValueError, RecursionError) as error:
        return RowError(f"the line is not valid JSON ({one_line(error)})")
    return row if isinstance(row, dict) else RowError(f"the line holds a {type(row).__name__}, not an object")


def _read_with_datasets(field: str, source: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        found = _open(source, split)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                fix = f"set {'data.split' if field == 'data.train' else 'data.heldout_split'} to one of {list(found)}"
                raise DataError(f"{field}: '{source}' has no split '{split}'; {fix}")
            found = found[split]
        for batch in found.iter(batch_size=1000):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(names, values, strict=True))
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = ":" if Path(source).expanduser().exists() else " is no file or folder here, and on the hub"
        raise DataError(f"{field}: '{source}'{where} split '{split}' cannot be loaded: {one_line(error)}") from error


def _open(source: str, split: str) -> Any:
    """The source as a `datasets.Dataset`, or as a DatasetDict of its splits."""
    import datasets

    path, hub = Path(source).expanduser(), _HUB_NAME.fullmatch(source)
    if path.is_file():
        return datasets.Dataset.from_parquet(str(path))
    if any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(path)
    if path.is_dir():  # a folder of data files, such as a clone of a hub data set
        return datasets.load_dataset(str(path), split=split)
    assert hub is not None, "read_rows lets nothing else through"
    return datasets.load_dataset(hub["name"], hub["config"], data_dir=hub["folder"], split=split)
