"""Where records come from: terminologies in PyPI packages, local files, the Hugging Face hub."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd
from datasets import Dataset, load_dataset

from fedllm.config import DataSettings
from fedllm.errors import DataError

COLUMNS = ("text", "label", "site", "unit")
_INSTRUCTIONS = {
    "icd10": "Name the ICD-10-CM chapter of the diagnosis.",
    "mcc": "Name the merchant category group of the business.",
}


def instruction(data: DataSettings) -> str:
    """Return the system message: the recipe's, or the source's own."""
    return data.instruction or _INSTRUCTIONS.get(data.source, "")


@lru_cache(maxsize=4)
def load_records(data: DataSettings) -> Dataset:
    """Return the records as string columns ``text``, ``label`` and, where named, ``site``, ``unit``.

    Raises
    ------
    DataError
        If the source cannot be read or lacks what the settings name.
    """
    if data.source == "icd10":
        frame = _unambiguous(_icd10())
    elif data.source == "mcc":
        frame = _unambiguous(_merchant_categories())
    elif data.source == "file":
        frame = read_file(Path(data.path), columns_of(data))
    else:
        frame = _from_hub(data)
    frame = _restrict(frame, data)
    if frame.empty:
        raise DataError(
            "no record is left after data.labels, data.min_per_label and data.max_per_label; loosen them."
        )
    return Dataset.from_pandas(frame.reset_index(drop=True), preserve_index=False)


def columns_of(data: DataSettings) -> dict[str, str]:
    """Return our column name -> the file's, for the columns the settings name."""
    named = {"text": data.text, "label": data.label, "site": data.site, "unit": data.unit}
    return {ours: theirs for ours, theirs in named.items() if theirs}


def label_names(data: DataSettings, labels: Iterable[str]) -> tuple[str, ...]:
    """Return the label texts: those of ``data.labels`` in its order, else those found, sorted."""
    if data.labels:
        return tuple(part.strip() for part in data.labels.split("|") if part.strip())
    return tuple(sorted(set(labels)))


def read_file(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read a csv, jsonl or parquet file into string columns.

    Parameters
    ----------
    columns : Mapping[str, str]
        Our name -> the file's.

    Raises
    ------
    DataError
        Naming the file and what is wrong; texts are never quoted.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such data file (data.path).")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the data file is empty.")
    try:
        frame = _parse(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise DataError(f"{path}: not a readable {path.suffix[1:]} file ({type(error).__name__}).") from None
    return _select(frame, columns, str(path))


def _parse(path: Path) -> pd.DataFrame:
    if path.suffix == ".csv":
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    if path.suffix in {".jsonl", ".ndjson"}:
        with path.open(encoding="utf-8") as file:
            return pd.read_json(file, lines=True, dtype=False)
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    raise DataError(f"{path}: data files end in .csv, .jsonl or .parquet.")


def _select(frame: pd.DataFrame, columns: Mapping[str, str], where: str) -> pd.DataFrame:
    if frame.empty:
        raise DataError(f"{where}: the data file has no rows.")
    for ours, theirs in columns.items():
        if theirs not in frame.columns:
            names = [str(name) for name in frame.columns]
            near = difflib.get_close_matches(theirs, names, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise DataError(
                f"{where}: no column '{theirs}' (data.{ours}); it has {', '.join(names)}.{hint}"
            )
    chosen = pd.DataFrame({ours: frame[theirs] for ours, theirs in columns.items()})
    for name in chosen.columns:
        empty = chosen[name].isna() | (chosen[name].astype(str).str.strip() == "")
        if empty.any():
            raise DataError(
                f"{where}: {int(empty.sum())} rows have no {name}, the first is row {int(empty.argmax()) + 1}."
            )
        chosen[name] = chosen[name].astype(str).str.strip()
    return chosen


def _from_hub(data: DataSettings) -> pd.DataFrame:
    try:
        found = load_dataset(data.name, split=data.split)
    except Exception as error:  # the hub client raises many kinds, all with the same remedy
        raise DataError(
            f"data.name: '{data.name}' could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}). Without a network use data.source=file with a local file."
        ) from None
    return _select(found.to_pandas(), columns_of(data), data.name)


def _icd10() -> pd.DataFrame:
    """Return ICD-10-CM leaf codes: description and short chapter title."""
    import simple_icd_10_cm as icd

    chapter: dict[str, str] = {}
    rows = []
    for code in icd.get_all_codes():
        if icd.is_leaf(code) and not icd.is_chapter_or_block(code):
            top = icd.get_ancestors(code)[-1]
            if top not in chapter:
                chapter[top] = short_chapter(icd.get_description(top))
            rows.append((icd.get_description(code).strip(), chapter[top], code.split(".")[0]))
    return pd.DataFrame(rows, columns=["text", "label", "unit"])


def short_chapter(title: str) -> str:
    """Return the leading words of a chapter's title, in lower case.

    >>> short_chapter("Diseases of the circulatory system (I00-I99)")
    'circulatory system'
    >>> short_chapter("Injury, poisoning and certain other consequences of external causes (S00-T88)")
    'injury'
    """
    title = re.sub(r"^(Diseases of the|Certain|Codes for)\s+", "", title)
    words = re.split(r",|\s+\(|\s+and\s|\s+of\s|\s+originating", title)[0]
    return words.lower()


def _merchant_categories() -> pd.DataFrame:
    """Return the networks' descriptions of merchant category codes and their group."""
    import iso18245

    rows = []
    for mcc in iso18245.get_all_mccs():
        group = mcc.range.description.strip()
        if mcc.range.reserved or not group:
            continue
        for text in (
            mcc.iso_description,
            mcc.usda_description,
            mcc.stripe_description,
            mcc.visa_description,
            mcc.alipay_description,
            mcc.mastercard_description,
            mcc.amex_description,
        ):
            if text.strip():
                rows.append((text.strip(), group.lower(), mcc.mcc))
    return pd.DataFrame(rows, columns=["text", "label", "unit"])


def _unambiguous(frame: pd.DataFrame) -> pd.DataFrame:
    """Drop repeated texts, and texts that occur under two labels."""
    key = frame["text"].str.casefold()
    labels = frame.groupby(key)["label"].transform("nunique")
    return frame[labels == 1].loc[lambda part: ~part["text"].str.casefold().duplicated()]


def _restrict(frame: pd.DataFrame, data: DataSettings) -> pd.DataFrame:
    counts = Counter(frame["label"])
    frame = frame[frame["label"].map(lambda label: counts[label] >= data.min_per_label)]
    if data.max_per_label:
        rank = frame["text"].map(_stable)
        frame = frame.loc[rank.sort_values(kind="stable").index]
        frame = frame.groupby("label", sort=False).head(data.max_per_label).sort_index()
    if data.labels:
        known = label_names(data, ())
        outside = ~frame["label"].isin(known)
        if outside.any() and data.source in {"file", "hub"}:
            raise DataError(f"{int(outside.sum())} records carry a label that data.labels does not list.")
        frame = frame[~outside]
    keep: Sequence[str] = [name for name in ("text", "label", *columns_of(data)) if name in frame.columns]
    return frame[list(dict.fromkeys(keep))]


def _stable(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
