"""One record of a site."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A record: input text, the answer, and whose it is.

    Attributes
    ----------
    unit : str
        The privacy unit (``data.unit``), such as a patient; empty when the unit is the record.
    pair : str
        The second text (``data.pair``), such as a hypothesis or a context; may be empty.
    rejected : str
        The answer that ``label`` is preferred to (``data.rejected``); empty without preferences.
    options : tuple[str, ...]
        What the record lets choose from (``data.options``), the label being a letter; else empty.
    usable : bool
        False for a record of a private site that counts but cannot train, such as one without a label.
    """

    text: str
    label: str
    unit: str
    pair: str = ""
    rejected: str = ""
    options: tuple[str, ...] = ()
    usable: bool = True


def normalised(text: str) -> str:
    """Return the text casefolded, with runs of white space as one blank.

    >>> normalised("  Acute\\n Bronchitis ")
    'acute bronchitis'
    """
    return " ".join(text.casefold().split())


def written(value: object) -> str:
    """Return a cell as a text: a missing one is empty, and a whole number has no decimals.

    >>> written(None), written(float("nan")), written(3.0), written(2.5), written("3.0")
    ('', '', '3', '2.5', '3.0')
    """
    if value is None or value != value:
        return ""
    # an integer column with gaps arrives as floats
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def contents(example: Example) -> tuple[str, ...]:
    """Return the record's texts and answers: all but whose it is."""
    # what a record lacks leaves its hash, and so the order of records, as it was
    pair = (example.pair,) if example.pair else ()
    rejected = ("rejected", example.rejected) if example.rejected else ()
    options = ("options", *example.options) if example.options else ()
    return (example.text, example.label, *pair, *rejected, *options)


def digest(*parts: object) -> bytes:
    """Return the Sha256 of the parts: texts, numbers, or lists of them."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()
