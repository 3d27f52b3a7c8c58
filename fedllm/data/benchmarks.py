"""Rows of a public question set, as they are: from the Hugging Face hub, or from a local file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from fedllm.data.files import SUFFIXES
from fedllm.errors import DataError

#: Where the hub keeps its own conversion of data sets that are scripts.
CONVERTED = "refs/convert/parquet"
_QUARTER_SEED = 42


def hub_rows(
    name: str, *, config: str, splits: Sequence[str], quarter: bool, converted: bool
) -> list[dict[str, Any]]:
    """Return the rows of some splits of a data set.

    Parameters
    ----------
    config : str
        Its configuration; empty: the only one.
    quarter : bool
        Only a quarter of the rows, drawn with seed 42.
    converted : bool
        Read the hub's conversion to parquet: what data sets that are scripts need.

    Raises
    ------
    DataError
        If it cannot be loaded.
    """
    options: dict[str, Any] = {"name": config or None}
    if converted:
        options = {"data_dir": config, "revision": CONVERTED}
    try:
        found = datasets.load_dataset(name, **options)
        rows = datasets.concatenate_datasets([found[split] for split in splits])
    except Exception as error:
        # network, hub and builder each raise kinds of their own, and all mean the same here
        raise DataError(
            f"data set {name} ({', '.join(splits)}) cannot be loaded ({type(error).__name__}). Check the "
            "network, or give a local file of the same columns with --file."
        ) from None
    if quarter:
        rows = rows.train_test_split(test_size=0.25, seed=_QUARTER_SEED)["test"]
    return [dict(row) for row in rows]


def file_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a csv, jsonl or parquet file; lists stay lists.

    Raises
    ------
    DataError
        If the file is missing, empty, damaged or of another kind, or has two columns of one name.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file '{suffix}'; use {', '.join(SUFFIXES)}.")
    try:
        rows = _parquet(path) if suffix == ".parquet" else _text(path, suffix)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or 'damaged'}).") from None
    except (ValueError, RecursionError, csv.Error, pa.ArrowException):
        raise DataError(f"{path}: not a readable {suffix} file in UTF-8.") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: the file has no rows with named columns.")
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    table = pq.ParquetFile(path).read()
    _require_once(path, table.column_names)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _text(path: Path, suffix: str) -> list[dict[str, Any]]:
    text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        _require_once(path, reader.fieldnames or ())
        return list(reader)
    # not splitlines(): a JSON string may hold U+2028 and its like
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _require_once(path: Path, columns: Sequence[str]) -> None:
    for place, name in enumerate(columns):
        # the name may be a record's text, where a file has no header
        if name and name in columns[:place]:
            first = columns.index(name)
            raise DataError(f"{path}: columns {first + 1} and {place + 1} have one name; rename one of them.")
