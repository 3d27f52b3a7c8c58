"""A record, and one site's share of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One record.

    Attributes
    ----------
    unit : str
        The privacy unit it belongs to (patient, customer); empty: the record itself.
    """

    text: str
    label: str
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """One site's records.

    Attributes
    ----------
    labels : tuple[str, ...]
        All label texts of the task.
    units : int
        Distinct privacy units among the training records.
    units_repeat : bool
        Whether a unit owns more than one training record.
    fingerprint : str
        sha256 over the training records, whatever their order.
    """

    name: str
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    labels: tuple[str, ...]
    instruction: str
    units: int
    units_repeat: bool
    fingerprint: str
