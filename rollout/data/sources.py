"""Every row of a source, in order: files that are tables, saved folders, data sets of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.data import DataSource
from rollout.data.rows import DataError, Row, Unreadable, nearest, one_line
from rollout.data.textfiles import TEXT_SUFFIXES, read_text_rows

SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
_HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(/(?P<folder>\w[\w./-]*))?(@(?P<revision>\w[\w./-]*))?(:(?P<config>[\w.-]+))?"
)
_ROWS_AT_ONCE = 1000


def read_rows(field: str, source: DataSource) -> list[Row]:
    """Every row of a file, a saved data set folder or a hub data set, in order; list index = row number.

    field: the config field that names the source, for messages.
    source.path: a hub name is 'owner/name', with '/folder' for a part of it, '@revision' for a branch, tag or commit,
    and ':config' for one of its configurations. source.split is used where the source has splits; a file has none.
    Text files are read here and not by `datasets`: its JSON builder gives up a whole file for one broken line or for
    answers that are now text and now numbers, and turns answers that look like dates into dates. Raises DataError.
    """
    path = Path(source.path).expanduser()
    if not path.exists() and (source.path.endswith(SUFFIXES) or not _HUB_NAME.fullmatch(source.path)):
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{field}: '{source.path}' does not exist{nearest(path.name, siblings)}")
    if path.is_file() and not source.path.endswith(SUFFIXES):
        raise DataError(f"{field}: '{source.path}' is of no known kind; use a file that ends in {', '.join(SUFFIXES)}")
    if path.is_file() and not source.path.endswith(".parquet"):
        rows = read_text_rows(field, path)
    else:
        rows = list(_parquet(field, path) if path.is_file() else _with_datasets(field, source))
    if not rows:
        raise DataError(f"{field}: '{source.path}' has no rows; name a data set that has some")
    return rows


def _parquet(field: str, path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from _table_rows(batch)
    except (OSError, ValueError, ArrowException) as error:
        raise DataError(f"{field}: '{path}' cannot be read ({one_line(error)}); write it again") from error


def _with_datasets(field: str, source: DataSource) -> Iterator[Row]:
    import datasets
    from pyarrow import ArrowException

    name, split = source.path, source.split
    try:
        found = _open(source)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                setting = f"{field}.split" if field.count(".") > 1 else _SPLIT_OF[field]
                raise DataError(f"{field}: '{name}' has no split '{split}'; set {setting} to one of {list(found)}")
            found = found[split]
        # As Arrow's own values: nothing decodes images or sound that nobody reads.
        for batch in found.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            yield from _table_rows(batch)
    except DataError:
        raise
    except (OSError, ValueError, ArrowException, datasets.exceptions.DatasetsError) as error:
        where = ":" if Path(name).expanduser().exists() else " is no file or folder here, and on the hub"
        raise DataError(f"{field}: '{name}'{where} split '{split}' cannot be loaded: {one_line(error)}") from error


_SPLIT_OF = {"data.train": "data.split", "data.heldout": "data.heldout_split"}


def _open(source: DataSource) -> Any:
    """The source as a `datasets.Dataset`, or as a DatasetDict of its splits."""
    import datasets

    path, hub = Path(source.path).expanduser(), _HUB_NAME.fullmatch(source.path)
    if any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(path)
    if path.is_dir():  # a folder of data files, such as a clone of a hub data set
        return datasets.load_dataset(str(path), split=source.split)
    assert hub is not None, "read_rows lets nothing else through"
    return datasets.load_dataset(
        hub["name"], hub["config"], data_dir=hub["folder"], revision=hub["revision"], split=source.split
    )


def _table_rows(table: Any) -> Iterator[Row]:
    """The rows of an Arrow table or batch, each value one of Python's."""
    columns = [_values(table.column(number)) for number in range(table.num_columns)]
    for values in zip(*columns, strict=True):
        yield dict(zip(table.schema.names, values, strict=True))


def _values(column: Any) -> list[Any]:
    """A column's values. One that has no form in Python spoils itself alone: years beyond 9999, broken text."""
    from pyarrow import types

    try:
        values = column.to_pylist()
    except (ValueError, OverflowError, TypeError):
        return [_value(item) for item in column]
    if types.is_float32(column.type) or types.is_float16(column.type):
        import numpy as np

        # 0.1, which as a float64 would print as 0.10000000149011612
        return [None if value is None else np.float32(value) for value in values]
    return list(values)


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except (ValueError, OverflowError, TypeError) as error:
        return Unreadable(one_line(error))
