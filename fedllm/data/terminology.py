"""Public terminologies that travel with their packages: ICD-10-CM and merchant categories."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

# (text, label, unit)
Row = tuple[str, str, str]

_SHORTEST_TEXT = 10
_NETWORKS = ("iso", "usda", "stripe", "visa", "alipay", "mastercard", "amex")


def chapter_label(description: str) -> str:
    """Return a short name of an ICD-10-CM chapter: its leading words, in lower case.

    >>> chapter_label("Diseases of the circulatory system (I00-I99)")
    'circulatory system'
    >>> chapter_label("Injury, poisoning and certain other consequences of external causes (S00-T88)")
    'injury'
    """
    name = re.sub(r"^(Diseases of the|Certain|Codes for) ", "", description)
    return re.split(r",| \(| and | of | originating ", name)[0].lower()


@lru_cache(maxsize=1)
def icd10_rows() -> tuple[Row, ...]:
    """Return (diagnosis description, chapter label, ICD-10-CM code) of the finest codes.

    The seventh character is left out: it repeats a description for the initial encounter, the
    subsequent one and the sequela, and such twins would stand in training and held-out records.
    """
    import simple_icd_10_cm as icd  # reads its whole table on import, two seconds

    rows = [
        (icd.get_description(code), chapter_label(icd.get_description(chapter)), code)
        for chapter in icd.get_all_codes()
        if icd.is_chapter(chapter)
        for code in icd.get_descendants(chapter)
        if icd.is_category_or_subcategory(code)
        and not icd.is_extended_subcategory(code)
        and all(icd.is_extended_subcategory(child) for child in icd.get_children(code))
    ]
    return _distinct(row for row in rows if len(row[0]) >= _SHORTEST_TEXT)


@lru_cache(maxsize=1)
def mcc_rows() -> tuple[Row, ...]:
    """Return (a network's description, range of the code, merchant category code)."""
    import iso18245

    rows = (
        (" ".join(item[f"{network}_description"].split()), item["mcc_range_description"], item["mcc"])
        for item in iso18245.get_all_mccs_dict()
        if not item["mcc_range_reserved_flag"]
        for network in _NETWORKS
    )
    return _distinct(row for row in rows if row[0])


def _distinct(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Keep one row of a text, and none of a text that occurs with two labels."""
    first: dict[str, Row] = {}
    ambiguous = set()
    for row in rows:
        if first.setdefault(row[0], row)[1] != row[1]:
            ambiguous.add(row[0])
    return tuple(row for text, row in first.items() if text not in ambiguous)
