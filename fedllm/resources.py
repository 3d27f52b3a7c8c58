"""Where the recipes and the Flower app are: in the wheel, or beside the package in a checkout."""

from __future__ import annotations

import os
from pathlib import Path

from fedllm.errors import ConfigError

_PACKAGE = Path(__file__).parent
_SHARE = _PACKAGE / "_share"


def recipes_dir() -> Path:
    """Return the folder of the recipes that ship."""
    return _SHARE / "recipes" if _SHARE.is_dir() else _PACKAGE.parent / "recipes"


def app_dir() -> Path:
    """Return the folder of the Flower app."""
    return _SHARE / "apps" / "finetune" if _SHARE.is_dir() else _PACKAGE.parent / "apps" / "finetune"


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship, such as ``demo/smoke``."""
    root = recipes_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.toml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, given as a path or by the name of one that ships.

    Raises
    ------
    ConfigError
        If there is neither; the message suggests the nearest name.
    """
    import difflib

    # a name may be too long for a file, which os.path takes for an answer
    if os.path.isfile(name):
        return Path(name)
    shipped = recipes_dir() / f"{name.removesuffix('.toml')}.toml"
    if os.path.isfile(shipped):
        return shipped
    near = difflib.get_close_matches(name.removesuffix(".toml"), recipe_names(), n=1, cutoff=0.4)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"{name}: no such recipe.{hint} `fedllm ls` shows the ones that ship.")
