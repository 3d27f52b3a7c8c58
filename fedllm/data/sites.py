"""Sites' records: simulated sites share one source, a real site reads its own file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

from fedllm.config import DataSettings
from fedllm.data.records import Example, SiteData
from fedllm.data.sources import columns_of, instruction, label_names, load_records, read_file
from fedllm.errors import DataError

__all__ = ["SiteData", "simulated_site", "site_from_file", "site_names"]


@lru_cache(maxsize=8)
def site_names(data: DataSettings, *, sites: int) -> tuple[str, ...]:
    """Return the names of simulated sites: the column's values, or ``site-0`` and so on.

    Raises
    ------
    DataError
        If the column has another number of values than there are sites.
    """
    if data.partition != "column":
        return tuple(f"site-{index}" for index in range(sites))
    names = tuple(sorted(set(load_records(data)["site"])))
    if len(names) != sites:
        raise DataError(
            f"data.site: column '{data.site}' names {len(names)} sites, federation.sites is {sites}; "
            "make them equal."
        )
    return names


@lru_cache(maxsize=16)
def simulated_site(data: DataSettings, *, sites: int, seed: int, index: int, fold: str) -> SiteData:
    """Return one simulated site's records.

    Parameters
    ----------
    fold : str
        Which half of the held-out records: ``test`` or ``validation``.

    Raises
    ------
    DataError
        If the source cannot be used, or the site gets fewer than two training records.
    """
    name = site_names(data, sites=sites)[index]
    records = load_records(data)
    part = _partition(data, sites=sites, seed=seed)[index]
    return _site(
        data,
        name,
        [part_example(row) for row in part],
        None,
        seed=seed,
        fold=fold,
        labels=label_names(data, records["label"]),
    )


@lru_cache(maxsize=16)
def site_from_file(
    data: DataSettings, *, path: str, heldout_path: str, name: str, seed: int, fold: str
) -> SiteData:
    """Return a real site's records from its own files.

    Parameters
    ----------
    heldout_path : str
        File of public records to evaluate on; empty: a share of the site's own is held out.

    Raises
    ------
    DataError
        If a file cannot be used, or leaves fewer than two training records.
    """
    columns = columns_of(replace(data, site=""))
    rows = read_file(Path(path), columns).to_dict("records")
    public = None
    if heldout_path:
        public = [part_example(row) for row in read_file(Path(heldout_path), columns).to_dict("records")]
    examples = [part_example(row) for row in rows]
    labels = label_names(data, (example.label for example in (*examples, *(public or ()))))
    if any(example.label not in labels for example in (*examples, *(public or ()))):
        raise DataError(f"{path}: some records carry a label that data.labels does not list.")
    return _site(data, name, examples, public, seed=seed, fold=fold, labels=labels)


def part_example(row: dict[str, str]) -> Example:
    """Return a row as an example."""
    return Example(text=row["text"], label=row["label"], unit=row.get("unit", ""))


@lru_cache(maxsize=4)
def _partition(data: DataSettings, *, sites: int, seed: int) -> tuple[Dataset, ...]:
    records = load_records(data)
    if len(records) < 2 * sites:
        raise DataError(f"{len(records)} records are too few for {sites} sites.")
    if data.partition == "iid":
        partitioner = IidPartitioner(num_partitions=sites)
        records = records.shuffle(seed=seed)
    elif data.partition == "dirichlet":
        partitioner = DirichletPartitioner(
            num_partitions=sites,
            partition_by="label",
            alpha=data.dirichlet_alpha,
            min_partition_size=min(10, len(records) // (2 * sites)),
            self_balancing=True,
            seed=seed,
        )
    else:
        partitioner = NaturalIdPartitioner(partition_by="site")
        records = records.sort("site")
    partitioner.dataset = records
    try:
        return tuple(partitioner.load_partition(index) for index in range(sites))
    except ValueError as error:
        raise DataError(
            f"data.dirichlet_alpha={data.dirichlet_alpha}: no split gives every site enough records "
            f"({type(error).__name__}); raise it or use another run.seed."
        ) from None


def _site(
    data: DataSettings,
    name: str,
    examples: Sequence[Example],
    public: Sequence[Example] | None,
    *,
    seed: int,
    fold: str,
    labels: tuple[str, ...],
) -> SiteData:
    train, heldout = [], list(public or ())
    seen = {_normal(example.text) for example in heldout}
    for example in examples:
        group = example.unit or _normal(example.text)
        place = _place(seed, name, group)
        text = _normal(example.text)
        if public is None and place < data.heldout:
            # the held-out half of the unit interval is cut once more into its two folds
            if (place < data.heldout / 2) == (fold == "test"):
                heldout.append(example)
        elif text not in seen:
            seen.add(text)
            train.append(example)
    if public is None:
        heldout = _without_leaks(heldout, {_normal(example.text) for example in train})
    if len(train) < 2:
        raise DataError(
            f"site {name}: {len(train)} training records are too few; give it more records, fewer sites, "
            "or a smaller data.heldout."
        )
    units = [example.unit for example in train if example.unit]
    return SiteData(
        name=name,
        train=tuple(train),
        heldout=tuple(heldout),
        labels=labels,
        instruction=instruction(data),
        units=len(set(units)) if units else len(train),
        units_repeat=len(units) != len(set(units)),
        fingerprint=_fingerprint(train),
    )


def _without_leaks(heldout: Iterable[Example], trained: set[str]) -> list[Example]:
    """Drop held-out texts that a unit of the training records has too, and repeats."""
    kept: dict[str, Example] = {}
    for example in heldout:
        text = _normal(example.text)
        if text not in trained:
            kept.setdefault(text, example)
    return list(kept.values())


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _place(seed: int, site: str, group: str) -> float:
    """Return a number in [0, 1) that depends on nothing but seed, site and group."""
    digest = hashlib.sha256(f"split\x1f{seed}\x1f{site}\x1f{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def _fingerprint(train: Iterable[Example]) -> str:
    rows = sorted(f"{e.text}\x1f{e.label}\x1f{e.unit}" for e in train)
    return hashlib.sha256("\x1e".join(rows).encode()).hexdigest()
