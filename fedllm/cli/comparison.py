"""A comparison's file, read and checked."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.cli.jobs import Comparison, Variant
from fedllm.errors import ConfigError
from fedllm.resources import find_recipe
from fedllm.settings import Scalar

#: Baselines that are runs of their own.
TRAINED = ("local", "central")

TABLES = {
    "": ("title", "recipe", "seeds", "metric", "minutes", "settings", "baselines", "cells", "groups"),
    "baselines": ("chance", "base", "majority", *TRAINED),
    **{f"baselines.{key}": ("settings",) for key in TRAINED},
    "cells": ("name", "settings"),
    "groups": ("name", "settings"),
}

#: Settings of which every run has its own.
OWN = ("run.seed", "run.dir", "run.resume")


def read_comparison(file: Path, *, seeds: str = "") -> Comparison:
    """Read and check a comparison's file.

    Parameters
    ----------
    file : Path
        The TOML file; `compare` describes it.
    seeds : str
        Seeds to take in place of the file's, separated by commas.

    Raises
    ------
    ConfigError
        If it cannot be read, naming the first key that is unknown, missing or wrong.
    """
    from fedllm.runs.measures import METRICS
    from fedllm.runs.outcomes import BASELINES, LINES

    values = _load(file)
    _known(values, "", file)
    for key in ("recipe", "seeds", "cells"):
        if key not in values:
            raise ConfigError(f"{file}: '{key}' is missing; `fedllm compare --help` shows a file.")
    recipe = _typed(values, "recipe", str, file)
    near = file.parent / recipe
    metric = _typed(values, "metric", str, file, "accuracy")
    if metric not in METRICS:
        raise ConfigError(f"{file}: metric '{metric}' is not one of {', '.join(METRICS)}.")
    baselines = _typed(values, "baselines", dict, file, {})
    _known(baselines, "baselines", file)
    wanted = {key: _baseline(baselines, key, file) for key in BASELINES}
    run = [
        Variant(BASELINES[key], {**own, "federation.mode": key})
        for key in TRAINED
        if (own := wanted[key]) is not None
    ]
    cells = _variants(values, "cells", file)
    _require_distinct([*cells, *(Variant(name, {}) for name in LINES)], "cells", file)
    groups = _variants(values, "groups", file) if "groups" in values else (Variant("all", {}),)
    _require_distinct(groups, "groups", file)
    minutes = values.get("minutes")
    return Comparison(
        title=_typed(values, "title", str, file, file.stem),
        recipe=near.resolve() if near.is_file() else find_recipe(recipe).resolve(),
        seeds=_seeds(seeds.split(",") if seeds else values["seeds"], "--seeds" if seeds else str(file)),
        metric=metric,
        minutes=None if minutes is None else float(_typed(values, "minutes", int | float, file)),
        settings=_settings(values, file),
        baselines=tuple(key for key, own in wanted.items() if own is not None),
        cells=(*cells, *run),
        groups=groups,
    )


def _load(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; `fedllm compare --help` shows one.") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start}).") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}.") from None


def _known(table: Mapping[str, object], name: str, file: Path) -> None:
    for key in table:
        if key not in TABLES[name]:
            where = f" in [{name}]" if name else ""
            raise ConfigError(f"{file}: unknown key '{key}'{where}.{nearest(key, TABLES[name])}")


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint at the known name that is meant, or at all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else f" There are {', '.join(known)}."


def _typed(table: Mapping[str, Any], key: str, kind: Any, file: Path, default: Any = None) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = {str: "a text", dict: "a table", bool: "true or false", list: "a list"}.get(kind, "a number")
        raise ConfigError(f"{file}: '{key}' must be {wanted}, got {value!r}.")
    return value


def _baseline(table: Mapping[str, Any], key: str, file: Path) -> dict[str, Scalar] | None:
    """Return what a baseline sets for itself, or None where it is not asked for."""
    value = table.get(key, False)
    if key in TRAINED and isinstance(value, dict):
        _known(value, f"baselines.{key}", file)
        return _settings(value, file)
    return {} if _typed(table, key, bool, file, False) else None


def _variants(values: Mapping[str, Any], key: str, file: Path) -> tuple[Variant, ...]:
    tables = _typed(values, key, list, file)
    if not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{file}: '{key}' must be one or more tables [[{key}]].")
    for table in tables:
        _known(table, key, file)
        if not Variant(_typed(table, "name", str, file, ""), {}).folder:
            raise ConfigError(f"{file}: every one of [[{key}]] needs a name with a letter or digit.")
    return tuple(Variant(table["name"], _settings(table, file)) for table in tables)


def _settings(table: Mapping[str, Any], file: Path) -> dict[str, Scalar]:
    """Return a ``settings`` table as dotted keys."""
    flat: dict[str, Scalar] = {}
    for section, values in _typed(table, "settings", dict, file, {}).items():
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: settings have a section, such as settings.train.lr; got '{section}'.")
        flat |= {f"{section}.{name}": value for name, value in values.items()}
    own = next((key for key in OWN if key in flat), None)
    if own is not None:
        raise ConfigError(f"{file}: {own} is set by the comparison; use seeds and --dir.")
    return flat


def _seeds(values: Any, where: str) -> tuple[int, ...]:
    try:
        found = tuple(int(str(value)) for value in values)
    except (TypeError, ValueError):
        found = ()
    if not found or len(set(found)) < len(found) or min(found) < 0:
        raise ConfigError(f"{where}: seeds must be one or more different whole numbers such as [1, 2, 3].")
    return found


def _require_distinct(variants: Sequence[Variant], key: str, file: Path) -> None:
    """Refuse names that are the same, also as folders."""
    names: dict[str, str] = {}
    for variant in variants:
        other = names.get(variant.folder)
        if other is not None:
            raise ConfigError(
                f"{file}: two of [[{key}]] are called '{other}' and '{variant.name}'; rename one."
            )
        names[variant.folder] = variant.name
