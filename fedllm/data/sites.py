"""One site's records: a share of a simulation's records, or the file of a real site."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import datasets

from fedllm.data.records import Example, normalised
from fedllm.data.sources import default_instruction, file_stamp, label_names, load_records
from fedllm.errors import ConfigError, DataError
from fedllm.settings import DataSettings

__all__ = [
    "Example",
    "SiteData",
    "simulated_site",
    "simulated_sites",
    "site_from_file",
    "site_names",
    "split",
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
    examples = _examples(_partition(data, sites, seed, file_stamp(data))[index])
    train, heldout = split(examples, by_unit=bool(data.unit), share=data.heldout, seed=seed)
    labels = label_names(data, load_records(data))
    own = _site_data(data, name=name, train=train, heldout=heldout, labels=labels, seed=seed, fold=fold)
    if not pooled:
        return own
    everything, _ = split(
        _examples(load_records(data)), by_unit=bool(data.unit), share=data.heldout, seed=seed
    )
    whole = _site_data(
        data, name=name, train=everything, heldout=heldout, labels=labels, seed=seed, fold=fold
    )
    return dataclasses.replace(whole, own_labels=tuple(example.label for example in own.train))


def simulated_sites(
    data: DataSettings, *, sites: int, seed: int, fold: str = "test", pooled: bool = False
) -> Iterator[SiteData]:
    """Yield the shares of all simulated sites, in order; see :func:`simulated_site`."""
    for index in range(sites):
        yield simulated_site(data, sites=sites, seed=seed, index=index, fold=fold, pooled=pooled)


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
    if heldout_path:
        public = load_records(dataclasses.replace(own, path=heldout_path, unit=""))
        train, heldout = _examples(records), _examples(public)
        own, records = dataclasses.replace(own, heldout_public=True), public
    elif private_heldout_path:
        apart = load_records(dataclasses.replace(own, path=private_heldout_path), lenient=lenient)
        train, heldout = _examples(records), _examples(apart)
        records = datasets.concatenate_datasets([records, apart])
    else:
        train, heldout = split(_examples(records), by_unit=bool(own.unit), share=own.heldout, seed=seed)
    # labels that only private records have are nobody's to score
    labels = label_names(own, None if lenient and not heldout_path else records)
    return _site_data(
        own, name=name, train=train, heldout=heldout, labels=labels, seed=seed, fold=fold, lenient=lenient
    )


def split(
    examples: Sequence[Example], *, by_unit: bool, share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Part records into training and held-out ones, whole groups at a time.

    A group is a privacy unit, or else a text up to case and white space. Its side is a function
    of seed and group alone, so other records never move it, and what several sites hold is held
    out at all of them.
    """
    train: list[Example] = []
    heldout: list[Example] = []
    for example in examples:
        held = _fraction("split", seed, _group(example, by_unit=by_unit)) < share
        (heldout if held else train).append(example)
    return train, heldout


def _site_data(
    data: DataSettings,
    *,
    name: str,
    train: Sequence[Example],
    heldout: Sequence[Example],
    labels: tuple[str, ...],
    seed: int,
    fold: str,
    lenient: bool = False,
) -> SiteData:
    # The side that yields must not tell of the other: public metrics must not depend on private
    # records, and training on private records not on further private ones.
    if lenient and data.heldout_public:
        public = {normalised(example.text) for example in heldout}
        train = [
            dataclasses.replace(one, usable=one.usable and normalised(one.text) not in public)
            for one in train
        ]
    elif data.heldout_public:
        train = _without(train, heldout)
    elif not lenient:
        heldout = _without(heldout, train)
    by_unit = bool(data.unit)
    first_half = fold == "test"
    heldout = [
        example
        for example in heldout
        if (_fraction("fold", seed, _group(example, by_unit=by_unit)) < 0.5) == first_half
    ]
    kept = _shuffled(train, seed=seed) if lenient else _distinct(train, seed=seed, by_unit=by_unit)
    if len(kept) < 2:
        raise DataError(
            f"site {name}: fewer than 2 different training records are left after the held-out ones were "
            "set apart. Give it more records, lower data.heldout, or use fewer sites."
        )
    rows = sorted(json.dumps([*_contents(example), example.unit]) for example in kept)
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
def _partition(
    data: DataSettings, sites: int, seed: int, stamp: tuple[int, int]
) -> tuple[datasets.Dataset, ...]:
    """Share the records among sites; every record goes to exactly one."""
    # slow to import, and real sites do not need it
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

    records = load_records(data)
    if records.num_rows < 2 * sites:
        raise DataError(
            f"{records.num_rows} records cannot be shared among federation.sites={sites}; use fewer sites."
        )
    if data.partition == "column":
        partitioner = NaturalIdPartitioner(partition_by="site")
    elif data.partition == "iid":
        partitioner = IidPartitioner(num_partitions=sites)
        records = records.shuffle(seed=seed)
    elif data.task == "generate":
        raise ConfigError("data.partition=dirichlet mixes labels, and data.task=generate has none.")
    else:
        partitioner = DirichletPartitioner(
            num_partitions=sites,
            partition_by="label",
            alpha=data.dirichlet_alpha,
            min_partition_size=min(10, records.num_rows // (2 * sites)),
            self_balancing=True,
            seed=seed,
        )
        records = records.shuffle(seed=seed)
    partitioner.dataset = records
    # the partitioners show a progress bar and tell of every new draw
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return tuple(partitioner.load_partition(index) for index in range(sites))
        except ValueError:
            raise DataError(
                f"data.dirichlet_alpha={data.dirichlet_alpha:g} leaves a site of {sites} without records; "
                "raise it, or use fewer sites."
            ) from None


def _examples(records: datasets.Dataset) -> list[Example]:
    columns = records[:]
    none = [""] * records.num_rows
    optional = (columns.get(role, none) for role in ("unit", "pair", "rejected"))
    options = map(tuple, columns.get("options", [()] * records.num_rows))
    usable = columns.get("usable", [True] * records.num_rows)
    rows = zip(columns["text"], columns["label"], *optional, options, usable, strict=True)
    return [Example(*row) for row in rows]


def _group(example: Example, *, by_unit: bool) -> str:
    # public records belong to nobody
    return f"unit {example.unit}" if by_unit and example.unit else f"text {normalised(example.text)}"


def _without(examples: Sequence[Example], others: Iterable[Example]) -> list[Example]:
    """Return the examples whose text, up to case and white space, is not among the others'."""
    texts = {normalised(example.text) for example in others}
    return [example for example in examples if normalised(example.text) not in texts]


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
        kept.setdefault((*_contents(example), *owner), example)
    return _shuffled(kept.values(), seed=seed)


def _shuffled(examples: Iterable[Example], *, seed: int) -> tuple[Example, ...]:
    """Return the examples in an order that contents decide."""
    return tuple(sorted(examples, key=lambda item: _digest("order", seed, *_contents(item))))


def _contents(example: Example) -> tuple[str, ...]:
    # what a record lacks leaves its hash, and so the order of records, as it was
    pair = (example.pair,) if example.pair else ()
    rejected = ("rejected", example.rejected) if example.rejected else ()
    options = ("options", *example.options) if example.options else ()
    return (example.text, example.label, *pair, *rejected, *options)


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _fraction(*parts: object) -> float:
    """Return a number in [0, 1) that is a pure function of the parts."""
    return int.from_bytes(_digest(*parts)[:6]) / 2**48
