"""A site's durable record of what was spent on each of its data sets.

Every spend is booked and synced to disk before its noise is drawn, so that a crash can only
count too much. Rows are chained by hashes: an altered, removed or reordered row is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import ACCOUNTANT, SAMPLER, Spend

GENESIS = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One booked spend.

    Attributes
    ----------
    dataset : str
        Name of the data set in the site's policy.
    data : str
        Fingerprint of the training records.
    run, round : str, int
        The run and round it was booked for.
    clipping_norm : float
        C; the noise's deviation is ``noise_multiplier * C``.
    cap, records : int
        Largest batch and number of units, where batches are capped; else 0.
    salt : str
        Random, so that the chain's hashes, which the coordinator sees, tell nothing about the rest.
    """

    dataset: str
    data: str
    run: str
    round: int
    clipping_norm: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    cap: int
    records: int
    relation: str
    time: str
    salt: str
    sampler: str = SAMPLER
    accountant: str = ACCOUNTANT

    @property
    def spend(self) -> Spend:
        """Return what the accountant needs."""
        return Spend(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps,
            cap=self.cap,
            records=self.records,
        )


def new_salt() -> str:
    """Return 16 random bytes as hex."""
    return os.urandom(16).hex()


class Ledger:
    """Append-only SQLite file of :class:`Entry` rows, chained by sha256.

    Raises
    ------
    PrivacyError
        On opening or reading, if the file is damaged or the chain is broken: training stops
        rather than guess what was spent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._connect() as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS entries "
                    "(number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)"
                )
        except (OSError, sqlite3.Error) as error:
            raise PrivacyError(f"{path}: the privacy ledger cannot be opened ({error}).") from None

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.path, isolation_level=None, timeout=300)
        try:
            database.execute("PRAGMA journal_mode=DELETE")
            database.execute("PRAGMA synchronous=EXTRA")
            yield database
        finally:
            database.close()

    def book(
        self, entry: Entry, *, allowed: Callable[[Sequence[Entry]], None] | None = None
    ) -> tuple[Entry, ...]:
        """Append an entry; on return it is on disk.

        Parameters
        ----------
        allowed : callable, optional
            Raises if the entry may not follow those there are. No other process books between its
            answer and the entry, so that two of them cannot spend the same rest of a budget.

        Returns
        -------
        tuple[Entry, ...]
            What was booked before, oldest first.

        Raises
        ------
        PrivacyError
            If it cannot be written (then nothing may be released).
        """
        try:
            with self._connect() as database:
                database.execute("BEGIN IMMEDIATE")
                rows = self._verified(database)
                before = self._read(rows)
                if allowed is not None:
                    allowed(before)
                number, head = len(rows) + 1, rows[-1][1] if rows else GENESIS
                body = json.dumps(asdict(entry), sort_keys=True)
                database.execute(
                    "INSERT INTO entries VALUES (?, ?, ?)", (number, body, _link(number, head, body))
                )
                database.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise PrivacyError(f"{self.path}: the spend could not be booked ({error}).") from None
        return before

    def entries(self, *, dataset: str | None = None, data: str | None = None) -> tuple[Entry, ...]:
        """Return entries, oldest first: all, or those of a data set's name or of these very records."""
        entries = self._read(self._rows())
        if dataset is None and data is None:
            return entries
        return tuple(entry for entry in entries if entry.dataset == dataset or entry.data == data)

    @property
    def head(self) -> str:
        """Return the hash of the newest row, to be kept elsewhere against rollback."""
        rows = self._rows()
        return rows[-1][1] if rows else GENESIS

    def require_head(self, seen: str) -> None:
        """Refuse a ledger that lacks a row somebody else has seen the hash of.

        Raises
        ------
        PrivacyError
            If the ledger was lost, shortened, or replaced by an older or another one.
        """
        if seen != GENESIS and all(link != seen for _, link in self._rows()):
            raise PrivacyError(
                f"{self.path}: the privacy ledger lacks a row whose hash was seen before: it was lost, "
                "rolled back or replaced. Restore the newest copy; training stays refused, since what was "
                "spent is unknown. (Another data set needs another name: dataset in the policy.)"
            )

    def _rows(self) -> list[tuple[str, str]]:
        try:
            with self._connect() as database:
                return self._verified(database)
        except (OSError, sqlite3.Error) as error:
            raise PrivacyError(f"{self.path}: the privacy ledger cannot be read ({error}).") from None

    def _read(self, rows: Iterable[tuple[str, str]]) -> tuple[Entry, ...]:
        try:
            return tuple(Entry(**json.loads(body)) for body, _ in rows)
        except (TypeError, ValueError):
            raise PrivacyError(
                f"{self.path}: the privacy ledger was written by another version of fedllm; open it with "
                "that one."
            ) from None

    def _verified(self, database: sqlite3.Connection) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        head = GENESIS
        for number, body, link in database.execute("SELECT number, body, hash FROM entries ORDER BY number"):
            if number != len(rows) + 1 or link != _link(number, head, body):
                raise PrivacyError(
                    f"{self.path}: the privacy ledger is damaged at row {number}; restore it from a "
                    "backup. Training stays refused, since what was spent is unknown."
                )
            rows.append((body, link))
            head = link
        return rows


def _link(number: int, head: str, body: str) -> str:
    return hashlib.sha256(f"{number}\n{head}\n{body}".encode()).hexdigest()
