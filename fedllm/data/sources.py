"""Where records come from: a shipped terminology, a local file, or a Hugging Face data set."""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets

from fedllm.data.files import as_options, as_strings, read_table, require_columns
from fedllm.data.options import MOST, fault, letter_of, letters, option_columns
from fedllm.data.terminology import icd10_rows, mcc_rows
from fedllm.errors import ConfigError, DataError
from fedllm.settings import DataSettings

#: Role -> values: texts, and lists of texts for ``options``.
Columns = dict[str, list[Any]]
_INSTRUCTIONS = {"icd10": "Name the ICD-10-CM chapter.", "mcc": "Name the merchant category."}
_SHOWN_ROWS = 3
# of the error of datasets for a configuration that is missing or unknown
_SUBSETS = re.compile(r"(?:available configs|Available): \[(.+?)\]")

log = logging.getLogger("fedllm.site")


def load_records(data: DataSettings, *, lenient: bool = False) -> datasets.Dataset:
    """Load the records of a recipe.

    ``data.labels`` restricts the labels, ``data.min_per_label`` drops rare ones, then
    ``data.max_per_label`` keeps the records with the smallest hashes of their texts, whatever
    their order. A file is read again after it changed.

    Parameters
    ----------
    lenient : bool
        Keep records with an empty cell, a foreign label or options that cannot be asked, marked as not
        ``usable``, where otherwise they are refused: a refusal, or a number of records that depends on
        the labels asked for, would tell the coordinator of a private run about them.

    Returns
    -------
    datasets.Dataset
        String columns ``text`` and ``label``; ``pair``, ``rejected``, ``site`` and ``unit`` where the
        settings name them; ``options``, lists of strings, where a record has its own, and then the label
        is the letter of the right one; ``usable``, true or false, if asked to be lenient.

    Raises
    ------
    DataError
        If the records cannot be used as the settings ask; no message quotes a record's text.
    ConfigError
        If the settings name a column or label that a shipped terminology does not have.
    """
    return _load(data, file_stamp(data), lenient)


def file_stamp(data: DataSettings) -> tuple[int, int]:
    """Return what tells two versions of ``data.path`` apart: time of change in ns, size in bytes."""
    path = Path(data.path).expanduser()
    if data.source != "file" or not path.is_file():
        return (0, 0)
    return (path.stat().st_mtime_ns, path.stat().st_size)


def label_names(data: DataSettings, records: datasets.Dataset | None) -> tuple[str, ...]:
    """Return the labels in the order of ``data.labels``, or those of the records, sorted.

    For ``data.task=choose`` they are the letters of the record with the most options, or without records
    all letters; for free text there are none.
    """
    if not data.labelled:
        return ()
    if data.task == "choose":
        return letters(MOST if records is None else max(map(len, records["options"]), default=0))
    listed = _listed_labels(data)
    return listed if records is None or listed else tuple(sorted(records.unique("label")))


def public_labels(data: DataSettings) -> tuple[str, ...]:
    """Return the labels that server and sites know: those listed, or those of a shipped terminology."""
    return label_names(data, None if data.labels else load_records(data))


def default_instruction(data: DataSettings) -> str:
    """Return ``data.instruction``, or the source's own one."""
    return data.instruction or _INSTRUCTIONS.get(data.source, "")


def column_roles(data: DataSettings) -> dict[str, str]:
    """Return role -> column name, for the columns the settings name."""
    roles = {
        "text": data.text,
        "pair": data.pair,
        "label": data.label,
        "rejected": data.rejected,
        "site": data.site,
        "unit": data.unit,
    }
    return {role: name for role, name in roles.items() if name}


@lru_cache(maxsize=4)
def _load(data: DataSettings, stamp: tuple[int, int], lenient: bool) -> datasets.Dataset:
    if data.source in _INSTRUCTIONS:
        where, columns = f"data.source={data.source}", _terminology(data)
    elif data.source == "file":
        if not data.path:
            raise DataError(
                "data.path: data.source=file needs a csv, jsonl or parquet file where sites are simulated "
                "(real sites name their own in their policy)."
            )
        path = Path(data.path).expanduser()
        table = read_table(path, column_roles(data), option_columns(data.options))
        where, columns = str(path), dict(table.values)
        if table.options:
            columns["options"] = [list(options) for options in table.options]
    else:
        where, columns = f"data set {data.name}", _hub(data)
    for role in ("label", "rejected", "site", "unit"):
        if role in columns:
            columns[role] = [value.strip() for value in columns[role]]
    if lenient:
        columns["usable"] = usable = _usable(where, data, columns)
        if data.task == "choose":
            asked = zip(columns["options"], columns["label"], usable, strict=True)
            columns["label"] = [
                letter_of(options, label, data.answers) if fit else "" for options, label, fit in asked
            ]
        return datasets.Dataset.from_dict(columns)
    for role, name in column_roles(data).items():
        _require_filled(where, role, name, columns[role])
    if data.task == "choose":
        columns["label"] = _lettered(where, data, columns)
    columns = _select(columns, _with_listed_labels(data, where, columns["label"]))
    columns = _select(columns, _within_limits(data, columns))
    if not columns["text"]:
        raise DataError(f"{where}: no record is left after data.labels and data.min_per_label.")
    return datasets.Dataset.from_dict(columns)


def _terminology(data: DataSettings) -> Columns:
    """Return the columns of icd10 or mcc."""
    known = {"icd10": "", "mcc": "mcc"}[data.source]
    for key, name in (("site", data.site), ("pair", data.pair), ("rejected", data.rejected)):
        if name:
            raise ConfigError(f"data.{key}={name}: data.source={data.source} has no such column.")
    if data.unit and data.unit != known:
        hint = f" but '{known}'" if known else ""
        raise ConfigError(f"data.unit={data.unit}: data.source={data.source} has no column of units{hint}.")
    rows = icd10_rows() if data.source == "icd10" else mcc_rows()
    columns = {"text": [row[0] for row in rows], "label": [row[1] for row in rows]}
    if data.unit:
        columns["unit"] = [row[2] for row in rows]
    return columns


def _hub(data: DataSettings) -> Columns:
    """Return the columns of a Hugging Face data set; class numbers become class names."""
    try:
        records = datasets.load_dataset(data.name, name=data.subset or None, split=data.split)
    except Exception as error:
        subsets = _SUBSETS.search(str(error))
        if subsets:
            raise DataError(
                f"data.subset: data set {data.name} has the configurations {subsets[1]}; name one of them."
            ) from None
        # network, hub and builder each raise kinds of their own, and all mean the same here
        raise DataError(
            f"data set {data.name} (split {data.split}) cannot be loaded ({type(error).__name__}). Check "
            "the name and the network, or use a local file: data.source=file, data.path=FILE."
        ) from None
    if not isinstance(records, datasets.Dataset):
        raise DataError(f"data set {data.name}: data.split must name one split, such as train.")
    roles = column_roles(data)
    options = option_columns(data.options)
    require_columns(f"data set {data.name}", records.column_names, roles, options)
    columns: Columns = {}
    for role, name in roles.items():
        values, kind = records[name][:], records.features[name]
        if isinstance(kind, datasets.ClassLabel):
            # -1 marks a hidden label
            values = [kind.names[value] if value is not None and value >= 0 else None for value in values]
        columns[role] = as_strings(f"data set {data.name}", name, values)
    if options:
        found = [records[name][:] for name in options]
        listed = as_options(f"data set {data.name}", options, found)
        columns["options"] = [list(own) for own in listed]
    return columns


def _usable(where: str, data: DataSettings, columns: Columns) -> list[bool]:
    """Return which records can be used, whatever the others are like; the site's log has their number."""
    listed = set(_listed_labels(data))
    filled = [all(map(str.strip, row)) for row in zip(*(columns[r] for r in column_roles(data)), strict=True)]
    if data.task == "choose":
        asked = zip(columns["options"], columns["label"], strict=True)
        right = [not fault(options, label, data.answers) for options, label in asked]
    else:
        right = [not listed or label in listed for label in columns["label"]]
    usable = [one and other for one, other in zip(filled, right, strict=True)]
    if not all(usable):
        log.warning(
            "%s: %d of %d records do not train: an empty cell, a label that is not in data.labels, or "
            "options that cannot be asked.",
            where,
            usable.count(False),
            len(usable),
        )
    return usable


def _lettered(where: str, data: DataSettings, columns: Columns) -> list[str]:
    """Return each record's right letter; refuse records that cannot be asked."""
    records = list(zip(columns["options"], columns["label"], strict=True))
    faults = ((number, fault(*record, data.answers)) for number, record in enumerate(records, start=1))
    wrong = [(number, reason) for number, reason in faults if reason]
    if wrong:
        number, reason = wrong[0]
        raise DataError(
            f"{where}: {len(wrong)} of {len(records)} records cannot be asked: record {number} has {reason} "
            f"(data.options, data.label, data.answers={data.answers}). Mend or remove them."
        )
    return [letter_of(*record, data.answers) for record in records]


def _require_filled(where: str, role: str, name: str, values: Sequence[str]) -> None:
    empty = [number for number, value in enumerate(values, start=1) if not value.strip()]
    if empty:
        shown = ", ".join(map(str, empty[:_SHOWN_ROWS])) + (", ..." if len(empty) > _SHOWN_ROWS else "")
        raise DataError(
            f"{where}: {len(empty)} of {len(values)} records have an empty '{name}' (data.{role}): record "
            f"{shown}. Fill or remove them."
        )


def _listed_labels(data: DataSettings) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label.strip() for label in data.labels.split("|") if label.strip()))


def _with_listed_labels(data: DataSettings, where: str, labels: Sequence[str]) -> list[int]:
    """Return the rows whose label ``data.labels`` lists; files must not hold others."""
    listed = _listed_labels(data)
    if not listed:
        return list(range(len(labels)))
    rows = [row for row, label in enumerate(labels) if label in set(listed)]
    if data.source in _INSTRUCTIONS:
        known = sorted(set(labels))
        for label in listed:
            if label not in known:
                near = difflib.get_close_matches(label, known, n=1, cutoff=0.3)
                hint = f" Did you mean '{near[0]}'?" if near else f" Its labels: {' | '.join(known)}."
                raise ConfigError(f"data.labels: '{label}' is not a label of {where}.{hint}")
    elif len(rows) < len(labels):
        raise DataError(
            f"{where}: {len(labels) - len(rows)} of {len(labels)} records have a label that is not among "
            f"the {len(listed)} of data.labels. Add it there, or remove the records."
        )
    return rows


def _within_limits(data: DataSettings, columns: Columns) -> list[int]:
    """Return the rows that ``data.min_per_label`` and ``data.max_per_label`` leave, in order."""
    counts = Counter(columns["label"])
    rows = [row for row, label in enumerate(columns["label"]) if counts[label] >= data.min_per_label]
    if data.max_per_label == 0:
        return rows
    by_label = defaultdict(list)
    for row in rows:
        by_label[columns["label"][row]].append(row)

    def rank(row: int) -> tuple[bytes, ...]:
        digest = hashlib.sha256(columns["text"][row].encode()).digest()
        return (digest, *(str(values[row]).encode() for values in columns.values()))

    return sorted(row for mine in by_label.values() for row in sorted(mine, key=rank)[: data.max_per_label])


def _select(columns: Columns, rows: Sequence[int]) -> Columns:
    return {role: [values[row] for row in rows] for role, values in columns.items()}
