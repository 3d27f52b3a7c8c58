"""Which records are held out: whole groups, of texts that are trained on nowhere."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from functools import lru_cache

from fedllm.data.records import Example, contents, digest, normalised
from fedllm.errors import DataError
from fedllm.settings import DataSettings

log = logging.getLogger("fedllm.site")


def split(
    examples: Sequence[Example], *, by_unit: bool, share: float, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Part records into training and held-out ones, whole groups at a time.

    A group is a privacy unit, or else a text up to case and white space. Its side is a function
    of seed and group alone, so other records never move it, and it is the same at all sites. A text
    that several units have may come out on both sides; then one of them yields.
    """
    train: list[Example] = []
    heldout: list[Example] = []
    for example in examples:
        held = _fraction("split", seed, _group(example, by_unit=by_unit)) < share
        (heldout if held else train).append(example)
    return train, heldout


def apart(
    train: Sequence[Example], heldout: Sequence[Example], staying: Set[str], *, public: bool
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return both sides, the one that yields without the other's texts.

    What stays must not tell of what yields: public metrics must not depend on private records, and
    training on private records not on further private ones.

    Parameters
    ----------
    staying : Set[str]
        Texts (:func:`texts_of`) of the side that stays: held-out records where they are public,
        else training ones.
    """
    return (_without(train, staying), heldout) if public else (train, _without(heldout, staying))


# cached, so that a site's log has its line once
@lru_cache(maxsize=4)
def beside_public(
    name: str, column: str, train: tuple[Example, ...], public: tuple[Example, ...], lenient: bool
) -> tuple[Example, ...]:
    """Return the training records without those of a public text; if lenient these stay, not usable."""
    texts = texts_of(public)
    left = _without(train, texts)
    if len(left) < len(train):
        log.warning(
            "site %s: %d of %d training records do not train: their text, in the column '%s', is in the "
            "public held-out file.",
            name,
            len(train) - len(left),
            len(train),
            column,
        )
    if not lenient:
        return left
    return tuple(
        dataclasses.replace(one, usable=one.usable and normalised(one.text) not in texts) for one in train
    )


def of_fold(heldout: Sequence[Example], *, by_unit: bool, seed: int, fold: str) -> list[Example]:
    """Return the half of the held-out records, whole groups, that is called test or validation."""
    first_half = fold == "test"
    return [
        example
        for example in heldout
        if (_fraction("fold", seed, _group(example, by_unit=by_unit)) < 0.5) == first_half
    ]


def require_fold(
    where: str,
    data: DataSettings,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    *,
    share: float,
    fold: str,
) -> None:
    """Refuse an empty fold that is empty because records share their texts, and not by chance.

    That is where the expected number of records in the fold would be one or more if each went its own
    way, and that of texts is less: a text that yields is held out where all units that have it are.

    Raises
    ------
    DataError
        If the fold is empty for that reason.
    """
    if heldout:
        return
    groups = defaultdict(set)
    for example in examples:
        groups[normalised(example.text)].add(_group(example, by_unit=bool(data.unit)))
    texts = sum(share ** (1 if data.heldout_public else len(owners)) for owners in groups.values())
    if texts / 2 < 1 <= len(_different(examples)) * share / 2:
        raise DataError(
            f"{where}: no record is left for evaluation.fold={fold}. {shared_texts(data, examples)}Or hold "
            "none out: data.heldout=0."
        )


def shared_texts(data: DataSettings, examples: Iterable[Example]) -> str:
    """Return how many records share their texts and what to do about it; nothing if none do."""
    texts = Counter(_different(examples).values())
    shared = sum(count for count in texts.values() if count > 1)
    if not shared:
        return ""
    return (
        f"{shared} of {texts.total()} different records share their text in the column '{data.text}' "
        "(data.text) with others, and no text is both trained on and held out: name the column that tells "
        "records apart in data.text (a sentence that all share fits data.instruction). "
    )


def _different(examples: Iterable[Example]) -> dict[tuple[str, ...], str]:
    """Return the different records, each with its text up to case and white space."""
    return {(example.unit, *contents(example)): normalised(example.text) for example in examples}


def texts_of(examples: Iterable[Example]) -> set[str]:
    """Return the records' texts, up to case and white space."""
    return {normalised(example.text) for example in examples}


def _without(examples: Sequence[Example], texts: Set[str]) -> tuple[Example, ...]:
    return tuple(example for example in examples if normalised(example.text) not in texts)


def _group(example: Example, *, by_unit: bool) -> str:
    # public records belong to nobody
    return f"unit {example.unit}" if by_unit and example.unit else f"text {normalised(example.text)}"


def _fraction(*parts: object) -> float:
    """Return a number in [0, 1) that is a pure function of the parts."""
    return int.from_bytes(digest(*parts)[:6]) / 2**48
