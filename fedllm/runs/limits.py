"""What simulated sites' own policies allow; a real site's policy never leaves it."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass

from fedllm.runs.folder import RunFolder


@dataclass(frozen=True)
class Limit:
    """A site's largest epsilon (inf: none set) and delta on its data, over all runs."""

    epsilon: float
    delta: float


def site_limits(folder: RunFolder, names: Iterable[str]) -> dict[str, Limit]:
    """Return site -> limit for the sites whose policy lies in the run folder and can be read."""
    limits = {}
    for name in names:
        try:
            policy = tomllib.loads((folder.site_dir(name) / "policy.toml").read_text(encoding="utf-8-sig"))
            epsilon, delta = float(policy["max_epsilon"]), float(policy["max_delta"])
        except (OSError, UnicodeError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError):
            continue
        limits[name] = Limit(epsilon if epsilon < 1e9 else math.inf, delta)
    return limits
