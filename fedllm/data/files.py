"""Read columns of a csv, jsonl or parquet file as strings, with errors that quote no record."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from fedllm.data.options import record_options
from fedllm.data.records import written
from fedllm.errors import DataError

SUFFIXES = (".csv", ".jsonl", ".parquet")
# a longer "column name" is most likely a record: the file has no header
_LONGEST_NAME = 60


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file's columns.

    Attributes
    ----------
    columns : tuple[str, ...]
        All column names, in the file's order.
    values : Mapping[str, list[str]]
        Role (``text``, ``label``, ``site``, ``unit``, ...) -> that column's values; a missing value is
        an empty string.
    options : tuple[tuple[str, ...], ...]
        Each record's options; empty where no column of options is asked for.
    """

    columns: tuple[str, ...]
    values: Mapping[str, list[str]]
    options: tuple[tuple[str, ...], ...] = ()


def read_table(path: Path, roles: Mapping[str, str], options: Sequence[str] = ()) -> Table:
    """Read the columns that have a role.

    Parameters
    ----------
    path : Path
        A ``.csv`` file with a header, a ``.jsonl`` file of objects, or a ``.parquet`` file.
    roles : Mapping[str, str]
        Role -> column name.
    options : Sequence[str]
        A column of lists of options, or one column an option.

    Raises
    ------
    DataError
        If the file is missing, empty, damaged, not UTF-8, of another kind, or lacks a column.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file '{suffix}'; use {', '.join(SUFFIXES)}.")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty.")
        if suffix == ".parquet":
            return _read_parquet(path, roles, options)
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at position {error.start}); "
            "save it as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    return (_read_csv if suffix == ".csv" else _read_jsonl)(path, text, roles, options)


def require_columns(
    where: object, columns: Sequence[str], roles: Mapping[str, str], options: Sequence[str] = ()
) -> None:
    """Refuse a table that lacks a column, naming the nearest one.

    Raises
    ------
    DataError
        If a column is missing or occurs twice.
    """
    for role, name in (*roles.items(), *(("options", name) for name in options)):
        if name not in columns:
            if any(len(column) > _LONGEST_NAME for column in columns):
                raise DataError(
                    f"{where}: no column '{name}' (data.{role}); its first line looks like no header."
                )
            near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise DataError(
                f"{where}: no column '{name}' (data.{role}). Its columns are {', '.join(columns)}.{hint}"
            )
        if columns.count(name) > 1:
            raise DataError(f"{where}: the column '{name}' (data.{role}) occurs twice; rename one.")


def as_strings(where: object, column: str, values: Sequence[object]) -> list[str]:
    """Return a column's values as strings; numbers are written out, missing values are empty.

    Raises
    ------
    DataError
        If the column holds lists, objects or bytes.
    """
    strings = []
    for value in values:
        if isinstance(value, list | dict | tuple | bytes):
            raise DataError(
                f"{where}: the column '{column}' holds {type(value).__name__} values, not text or numbers."
            )
        strings.append(written(value))
    try:
        "".join(strings).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: the column '{column}' holds half a surrogate pair (\\ud800-\\udfff)."
        ) from None
    return strings


def as_options(
    where: object, names: Sequence[str], columns: Sequence[Sequence[object]]
) -> tuple[tuple[str, ...], ...]:
    """Return each record's options from the columns that hold them; nothing where there are none.

    Raises
    ------
    DataError
        If a value is neither text nor a list of texts, naming the record.
    """
    found = []
    for number, values in enumerate(zip(*columns, strict=True), start=1):
        try:
            found.append(record_options(values))
            "".join(found[-1]).encode()
        except ValueError:
            raise DataError(
                f"{where}: record {number} has no readable options in '{', '.join(names)}' (data.options): "
                "one column holds lists of texts, or texts with | between; several hold one text each."
            ) from None
    return tuple(found)


def _read_csv(path: Path, text: str, roles: Mapping[str, str], options: Sequence[str]) -> Table:
    # a cell may be as long as the file
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        require_columns(path, columns, roles, options)
        rows = []
        for row in reader:
            if row and len(row) != len(columns):
                raise DataError(
                    f"{path}: line {reader.line_num} has {len(row)} values, the header names "
                    f"{len(columns)} columns; put texts with commas or line breaks in double quotes."
                )
            if row:
                rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}: not valid csv near line {reader.line_num} ({error}).") from None
    _require_rows(path, len(rows))
    places = {role: columns.index(name) for role, name in roles.items()}
    return Table(
        columns=tuple(columns),
        values={role: [row[place] for row in rows] for role, place in places.items()},
        options=as_options(path, options, [[row[columns.index(name)] for row in rows] for name in options]),
    )


def _read_jsonl(path: Path, text: str, roles: Mapping[str, str], options: Sequence[str]) -> Table:
    rows = []
    # not splitlines(): a JSON string may hold U+2028 and its like
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}: line {number} is not valid JSON.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is not a JSON object such as {{...}}.")
        rows.append(row)
    _require_rows(path, len(rows))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    require_columns(path, columns, roles, options)
    return Table(
        columns=tuple(columns),
        values={
            role: as_strings(path, name, [row.get(name) for row in rows]) for role, name in roles.items()
        },
        options=as_options(path, options, [[row.get(name) for row in rows] for name in options]),
    )


def _read_parquet(path: Path, roles: Mapping[str, str], options: Sequence[str]) -> Table:
    try:
        columns = pq.ParquetFile(path).schema_arrow.names
        require_columns(path, columns, roles, options)
        table = pq.ParquetFile(path).read(columns=sorted({*roles.values(), *options}))
    except pa.ArrowException:
        raise DataError(f"{path}: not a readable parquet file.") from None
    _require_rows(path, table.num_rows)
    return Table(
        columns=tuple(columns),
        values={role: as_strings(path, name, table.column(name).to_pylist()) for role, name in roles.items()},
        options=as_options(path, options, [table.column(name).to_pylist() for name in options]),
    )


def _require_rows(path: Path, rows: int) -> None:
    if rows == 0:
        raise DataError(f"{path}: the file has no records.")
