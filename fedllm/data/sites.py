"""One site's records: a share of a simulation's records, or the file of a real site."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import datasets

from fedllm.data.heldout import apart, beside_public, of_fold, require_fold, shared_texts, split, texts_of
from fedllm.data.partition import shared_out
from fedllm.data.records import Example, contents, digest
from fedllm.data.sources import default_instruction, file_stamp, label_names, load_records
from fedllm.errors import DataError
from fedllm.settings import DataSettings

__all__ = [
    "Example",
    "SiteData",
    "elsewhere",
    "simulated_site",
    "simulated_sites",
    "site_from_file",
    "site_names",
]


@dataclass(frozen=True, kw_only=True)
class SiteData:
    """What one site trains and is evaluated on.

    Attributes
    ----------
    train : tuple[Example, ...]
        In an order that depends on seed and contents alone.
    heldout : tuple[Example, ...]
        The fold asked for, in such an order: its first n records are a random sample.
    labels : tuple[str, ...]
        Labels, or letters of options, to choose from; empty for free text (``data.task=generate``).
    units : tuple[tuple[int, ...], ...]
        The privacy units: positions in ``train`` of the records each owns.
    fingerprint : str
        Sha256 over the sorted training records, as hex.
    lenient : bool
        Whether a record that cannot be used stays without training, where otherwise it is refused.
    own_labels : tuple[str, ...] or None
        Labels of the site's own training records where ``train`` holds all sites'; else None.
    """

    name: str
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    labels: tuple[str, ...]
    instruction: str
    units: tuple[tuple[int, ...], ...]
    fingerprint: str
    lenient: bool = False
    own_labels: tuple[str, ...] | None = None


def site_names(data: DataSettings, *, sites: int) -> tuple[str, ...]:
    """Return the names of simulated sites: those of the column, sorted, or site-0, site-1, ...

    Raises
    ------
    DataError
        If the column does not name ``sites`` sites, or one cannot be a folder's name.
    """
    if data.partition != "column":
        return tuple(f"site-{index}" for index in range(sites))
    names = tuple(sorted(load_records(data).unique("site")))
    if len(names) != sites:
        raise DataError(
            f"the column '{data.site}' (data.site) names {len(names)} sites, federation.sites asks for "
            f"{sites}; set federation.sites={len(names)}."
        )
    unfit = sum(re.fullmatch(r"\w[\w .-]{0,63}", name) is None for name in names)
    if unfit:
        raise DataError(
            f"the column '{data.site}' (data.site): {unfit} names cannot be folder names; use letters, "
            "digits, blanks, '.', '_' and '-', at most 64 of them."
        )
    return names


def simulated_site(
    data: DataSettings, *, sites: int, seed: int, index: int, fold: str = "test", pooled: bool = False
) -> SiteData:
    """Return the share of one simulated site.

    Parameters
    ----------
    index : int
        Which of the ``sites`` sites, from 0.
    fold : str
        ``test`` or ``validation``: the half of the held-out records to return.
    pooled : bool
        Train on the training records of all sites (the central baseline); held-out records stay the
        site's own.

    Raises
    ------
    DataError
        If the records cannot be used or shared as asked, or fewer than two are left to train on.
    ConfigError
        If the settings contradict the source.
    """
    name = site_names(data, sites=sites)[index]
    stamp = file_stamp(data)
    by_unit = bool(data.unit)
    everyone, staying = _everyone(data, seed, fold, stamp)
    examples = _examples(shared_out(data, sites=sites, seed=seed, stamp=stamp)[index])
    train, heldout = split(examples, by_unit=by_unit, share=data.heldout, seed=seed)
    train, heldout = apart(train, heldout, staying, public=data.heldout_public)
    heldout = of_fold(heldout, by_unit=by_unit, seed=seed, fold=fold)
    labels = label_names(data, load_records(data))
    own = _site_data(data, name=name, train=train, heldout=heldout, labels=labels, seed=seed, found=examples)
    if not pooled:
        return own
    whole = _site_data(data, name=name, train=everyone, heldout=heldout, labels=labels, seed=seed)
    return dataclasses.replace(whole, own_labels=tuple(example.label for example in own.train))


def simulated_sites(
    data: DataSettings, *, sites: int, seed: int, fold: str = "test", pooled: bool = False
) -> Iterator[SiteData]:
    """Yield the shares of all simulated sites, in order; see :func:`simulated_site`."""
    for index in range(sites):
        yield simulated_site(data, sites=sites, seed=seed, index=index, fold=fold, pooled=pooled)


def elsewhere(
    data: DataSettings, *, sites: int, seed: int, index: int, fold: str = "test", records: int = 0
) -> SiteData:
    """Return the held-out records of all simulated sites but one, to judge that one's own adapter on.

    Parameters
    ----------
    records : int
        About how many there shall be, as many of each site and at least one (0: as the one site has itself).

    Raises
    ------
    DataError
        As :func:`simulated_site`.
    """
    shares = list(simulated_sites(data, sites=sites, seed=seed, fold=fold))
    each = -(-(records or len(shares[index].heldout)) // (sites - 1))
    heldout = [one for share in (*shares[:index], *shares[index + 1 :]) for one in share.heldout[:each]]
    return dataclasses.replace(shares[index], train=(), units=(), heldout=tuple(heldout))


def site_from_file(
    data: DataSettings,
    *,
    path: str,
    name: str,
    seed: int,
    fold: str = "test",
    heldout_path: str = "",
    private_heldout_path: str = "",
    lenient: bool = False,
) -> SiteData:
    """Return a real site's records: all of its own file.

    ``data.min_per_label`` and ``data.max_per_label`` shape simulations only: under them one
    private record could decide about others.

    Parameters
    ----------
    heldout_path : str
        A file of public records to evaluate on; the site's own then all train.
    private_heldout_path : str
        A file of private records to evaluate on. In a private run neither file has a say in which
        records of the other are used.
    lenient : bool
        Count every row of the file, whatever the server's settings: none is held out or dropped for
        being like another, and those that cannot be used, or are among the public ones, do not train.

    Raises
    ------
    DataError
        If a file cannot be used, or fewer than two records are left to train on.
    """
    own = dataclasses.replace(
        data, source="file", path=path, site="", partition="iid", min_per_label=0, max_per_label=0
    )
    own = dataclasses.replace(own, heldout=0.0 if lenient else own.heldout)
    records = load_records(own, lenient=lenient)
    examples = asked = _examples(records)
    share = 1.0
    train: Sequence[Example]
    heldout: Sequence[Example]
    if heldout_path:
        own = dataclasses.replace(own, heldout_public=True)
        records = load_records(dataclasses.replace(own, path=heldout_path, unit=""))
        asked = _examples(records)
        train, heldout = beside_public(name, own.text, tuple(examples), tuple(asked), lenient), asked
    elif private_heldout_path:
        private = load_records(dataclasses.replace(own, path=private_heldout_path), lenient=lenient)
        asked = _examples(private)
        train, heldout = examples, asked
        records = datasets.concatenate_datasets([records, private])
    else:
        share = own.heldout
        train, heldout = split(examples, by_unit=bool(own.unit), share=share, seed=seed)
    if not lenient and not heldout_path:
        staying = texts_of(heldout if own.heldout_public else train)
        train, heldout = apart(train, heldout, staying, public=own.heldout_public)
    heldout = of_fold(heldout, by_unit=bool(own.unit), seed=seed, fold=fold)
    if not lenient:
        require_fold(f"site {name}", own, asked, heldout, share=share, fold=fold)
    # labels that only private records have are nobody's to score
    labels = label_names(own, None if lenient and not heldout_path else records)
    return _site_data(
        own,
        name=name,
        train=train,
        heldout=heldout,
        labels=labels,
        seed=seed,
        found=() if lenient else examples,
        lenient=lenient,
    )


def _site_data(
    data: DataSettings,
    *,
    name: str,
    train: Sequence[Example],
    heldout: Sequence[Example],
    labels: tuple[str, ...],
    seed: int,
    found: Sequence[Example] = (),
    lenient: bool = False,
) -> SiteData:
    by_unit = bool(data.unit)
    kept = _shuffled(train, seed=seed) if lenient else _distinct(train, seed=seed, by_unit=by_unit)
    if len(kept) < 2:
        raise DataError(
            f"site {name}: fewer than 2 different training records are left after the held-out ones were "
            f"set apart. {shared_texts(data, found)}Give it more records, lower data.heldout, or use fewer "
            "sites."
        )
    rows = sorted(json.dumps([*contents(example), example.unit]) for example in kept)
    return SiteData(
        name=name,
        train=kept,
        heldout=_distinct(heldout, seed=seed, by_unit=by_unit),
        labels=labels,
        instruction=default_instruction(data),
        units=_owned(kept) if by_unit else tuple((position,) for position in range(len(kept))),
        fingerprint=hashlib.sha256("\n".join(rows).encode()).hexdigest(),
        lenient=lenient,
    )


@lru_cache(maxsize=4)
def _everyone(
    data: DataSettings, seed: int, fold: str, stamp: tuple[int, int]
) -> tuple[Sequence[Example], set[str]]:
    """Return what all simulated sites train on, and the texts that stay on their side at all of them."""
    examples = _examples(load_records(data))
    by_unit = bool(data.unit)
    train, heldout = split(examples, by_unit=by_unit, share=data.heldout, seed=seed)
    staying = texts_of(heldout if data.heldout_public else train)
    train, heldout = apart(train, heldout, staying, public=data.heldout_public)
    require_fold(
        "the simulated sites",
        data,
        examples,
        of_fold(heldout, by_unit=by_unit, seed=seed, fold=fold),
        share=data.heldout,
        fold=fold,
    )
    return train, staying


def _examples(records: datasets.Dataset) -> list[Example]:
    columns = records[:]
    none = [""] * records.num_rows
    optional = (columns.get(role, none) for role in ("unit", "pair", "rejected"))
    options = map(tuple, columns.get("options", [()] * records.num_rows))
    usable = columns.get("usable", [True] * records.num_rows)
    rows = zip(columns["text"], columns["label"], *optional, options, usable, strict=True)
    return [Example(*row) for row in rows]


def _owned(examples: Sequence[Example]) -> tuple[tuple[int, ...], ...]:
    """Return the positions of each unit's records, in the order of the units' first ones."""
    owned: dict[str, list[int]] = {}
    for position, example in enumerate(examples):
        owned.setdefault(example.unit, []).append(position)
    return tuple(tuple(positions) for positions in owned.values())


def _distinct(examples: Iterable[Example], *, seed: int, by_unit: bool) -> tuple[Example, ...]:
    """Keep one of the records with the same texts and answers, in an order that contents decide.

    A text with two labels stays with both: were one dropped, a private record could replace
    another instead of just being there or not. With units each keeps its own copy, for the same reason.
    """
    kept: dict[tuple[str, ...], Example] = {}
    for example in sorted(examples, key=lambda example: example.unit):
        owner = (example.unit,) if by_unit else ()
        kept.setdefault((*contents(example), *owner), example)
    return _shuffled(kept.values(), seed=seed)


def _shuffled(examples: Iterable[Example], *, seed: int) -> tuple[Example, ...]:
    """Return the examples in an order that contents decide."""
    return tuple(sorted(examples, key=lambda item: digest("order", seed, *contents(item))))
