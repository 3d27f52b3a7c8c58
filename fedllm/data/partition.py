"""Which simulated site gets which records."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter, defaultdict
from functools import lru_cache

import datasets

from fedllm.data.sources import load_records
from fedllm.errors import ConfigError, DataError
from fedllm.settings import DataSettings


@lru_cache(maxsize=4)
def shared_out(
    data: DataSettings, *, sites: int, seed: int, stamp: tuple[int, int]
) -> tuple[datasets.Dataset, ...]:
    """Share the records among sites; every record goes to exactly one.

    Where the records have units and no column names their sites, a unit's records stay together: what
    a site promises its patients would otherwise add up over the sites that a patient is scattered over.

    Parameters
    ----------
    stamp : tuple[int, int]
        The file's (:func:`~fedllm.data.sources.file_stamp`), as it is read again after it changed.

    Raises
    ------
    DataError
        If there are too few records or units, or a label mix leaves a site without any.
    ConfigError
        If labels are to be mixed where there are none.
    """
    # slow to import, and real sites do not need it
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

    records = load_records(data)
    whole_units = bool(data.unit) and data.partition != "column"
    rows = _owners(records) if whole_units else records
    if rows.num_rows < 2 * sites:
        kind = "units (data.unit)" if whole_units else "records"
        raise DataError(
            f"{rows.num_rows} {kind} cannot be shared among federation.sites={sites}; use fewer sites."
        )
    if data.partition == "column":
        partitioner = NaturalIdPartitioner(partition_by="site")
    elif data.partition == "iid":
        partitioner = IidPartitioner(num_partitions=sites)
        rows = rows.shuffle(seed=seed)
    elif data.task == "generate":
        raise ConfigError("data.partition=dirichlet mixes labels, and data.task=generate has none.")
    else:
        partitioner = DirichletPartitioner(
            num_partitions=sites,
            partition_by="label",
            alpha=data.dirichlet_alpha,
            min_partition_size=min(10, rows.num_rows // (2 * sites)),
            self_balancing=True,
            seed=seed,
        )
        rows = rows.shuffle(seed=seed)
    partitioner.dataset = rows
    # the partitioners show a progress bar and tell of every new draw
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            shares = tuple(partitioner.load_partition(index) for index in range(sites))
        except ValueError:
            raise DataError(
                f"data.dirichlet_alpha={data.dirichlet_alpha:g} leaves a site of {sites} without records; "
                "raise it, or use fewer sites."
            ) from None
    return tuple(_owned_by(records, share) for share in shares) if whole_units else shares


def _owners(records: datasets.Dataset) -> datasets.Dataset:
    """Return the units, each with the commonest label of its records."""
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for unit, label in zip(records["unit"], records["label"], strict=True):
        labels[unit][label] += 1
    return datasets.Dataset.from_dict(
        {"unit": list(labels), "label": [counts.most_common(1)[0][0] for counts in labels.values()]}
    )


def _owned_by(records: datasets.Dataset, owners: datasets.Dataset) -> datasets.Dataset:
    units = set(owners["unit"])
    return records.select([row for row, unit in enumerate(records["unit"]) if unit in units])
