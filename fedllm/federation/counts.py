"""What the coordinator reads from noised counts of right answers."""

from __future__ import annotations

from collections.abc import Mapping

from fedllm.evaluation.noised import noised_accuracy
from fedllm.federation.records import Note, Notes, number
from fedllm.runs.events import INTERVAL

#: What a site counts: held-out records, those that the finished adapter has right, and the untuned base.
COUNTS = ("records", "right", "base_right")
#: What stands behind a data set's name in the ledger where its held-out records were counted.
HELDOUT = ", held out"


def noised_accuracies(notes: Mapping[str, Note], *, noise_multiplier: float) -> Notes:
    """Return a reply's noised counts as the notes of an ordinary evaluation; empty if it has none.

    Raises
    ------
    WireError
        If one of them is not a number.
    """
    records, right, base = (number(notes, f"noised_{name}") for name in COUNTS)
    if records is None or right is None or base is None:
        return {}
    found: Notes = {}
    for prefix, count in (("", right), ("base_", base)):
        found[f"{prefix}records"] = max(0, round(records))
        known = noised_accuracy(records, count, deviation=noise_multiplier * len(COUNTS) ** 0.5)
        if known is not None:
            names = ("accuracy", *INTERVAL)
            found |= {f"{prefix}{name}": value for name, value in zip(names, known, strict=True)}
    return found
