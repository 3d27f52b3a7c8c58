"""The site's own policy: what its owner allows, whatever a server asks."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import tomli_w

from fedllm.errors import BudgetError, ConfigError
from fedllm.settings import PrivacySettings

#: Rows of metrics.csv and tables that are not sites.
RESERVED = ("federation", "all sites")
#: What to do about a name that cannot be a site's.
SITE_NAMES = "use at most 64 letters, digits, blanks, '.', '_' and '-', and none of the words " + ", ".join(
    RESERVED
)
#: Largest value of each number that is a limit; none is below 0.
_NUMBERS = {
    "max_epsilon": math.inf,
    "max_delta": 1.0,
    "min_noise_multiplier": math.inf,
    "min_site_noise": math.inf,
    "public_units": math.inf,
    "max_rank": math.inf,
}
_PATHS = ("data_path", "heldout_path", "private_heldout_path", "public_path", "state_dir", "model_path")


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """A site's data and limits; the file never leaves the site.

    Attributes
    ----------
    site : str
        Name under which the site appears in the run.
    data_path : str
        The site's own csv, jsonl or parquet file; empty for simulated sites.
    text, label, pair, rejected, options, unit : str
        The columns of that file that a run may read; the recipe's names do not count. Without a
        ``unit`` the unit of privacy is the record.
    require_privacy : bool
        Refuse runs without differential privacy.
    max_epsilon, max_delta : float
        Largest total spend on this data set over all runs, at ``max_delta``.
    min_noise_multiplier : float
        Least noise a run may use.
    min_site_noise : float
        Least noise multiplier of this site's own share of the noise that hides whole sites, z over the
        square root of the quorum: what the coordinator faces. Above 0 runs without
        ``site_privacy.noise_at=sites`` are refused.
    state_dir : str
        Folder of ledger and cache; relative to the policy file.
    dataset : str
        Name under which the ledger books what is spent on this data; two files with the same
        patients or customers belong under one name.
    heldout_path : str
        A file of public records to evaluate on. Without it a private run sends no metric from a
        real site.
    private_heldout_path : str
        A file of private records to evaluate on, where ``heldout_path`` names no public ones. Their counts
        leave with noise and are booked as ``dataset`` with ", held out" after it.
    public_path : str
        A file of public records of the same kind, for ``adapter.basis=public-gradient``.
    public_units : int
        A number of training units that may be known, near the true one: sample rate, noise and refusals
        follow from it, so that nothing that leaves tells the true number. 0: the true one does, and counts
        as public.
    max_rank : int
        Largest adapter rank the site trains; 0: whatever the recipe asks for.
    model_path : str
        The site's own folder with the base model; empty: the recipe's model by name.
    """

    site: str
    data_path: str = ""
    text: str = "text"
    label: str = "label"
    pair: str = ""
    rejected: str = ""
    options: str = ""
    unit: str = ""
    require_privacy: bool = True
    max_epsilon: float = 8.0
    max_delta: float = 1e-5
    min_noise_multiplier: float = 0.3
    min_site_noise: float = 0.0
    state_dir: str = "state"
    dataset: str = "records"
    heldout_path: str = ""
    private_heldout_path: str = ""
    public_path: str = ""
    public_units: int = 0
    max_rank: int = 0
    model_path: str = ""

    def to_toml(self) -> str:
        """Return the policy as TOML text."""
        return tomli_w.dumps({item.name: getattr(self, item.name) for item in fields(self)})

    def require(self, privacy: PrivacySettings) -> None:
        """Refuse settings the policy does not allow, before any data is read.

        Raises
        ------
        BudgetError
            Naming the setting and the limit.
        """
        if not privacy.enabled:
            if self.require_privacy:
                raise BudgetError(f"site {self.site}: its policy requires privacy.enabled=true.")
            return
        if privacy.delta > self.max_delta:
            raise BudgetError(
                f"site {self.site}: privacy.delta={privacy.delta:g} exceeds its policy's {self.max_delta:g}."
            )
        if privacy.epsilon > self.max_epsilon:
            raise BudgetError(
                f"site {self.site}: privacy.epsilon={privacy.epsilon:g} exceeds its policy's "
                f"{self.max_epsilon:g}."
            )
        if self.public_units and privacy.batch_cap:
            raise BudgetError(
                f"site {self.site}: privacy.batch_cap is accounted for with the true number of units, and "
                "its policy's public_units keeps that number to itself."
            )

    def require_site_noise(self, share: float) -> None:
        """Refuse a smaller share of the noise on whole sites than the policy's least.

        Parameters
        ----------
        share : float
            Noise multiplier of this site's share alone; 0 where the site adds none.

        Raises
        ------
        BudgetError
            Naming both numbers.
        """
        if share < self.min_site_noise:
            raise BudgetError(
                f"site {self.site}: its policy wants a share of noise of {self.min_site_noise:g} at least on "
                f"its whole change, and this run comes to {share:.3g} (site_privacy.noise_at=sites, "
                "noise multiplier over the square root of the quorum)."
            )

    def require_noise(self, noise_multiplier: float) -> None:
        """Refuse less noise than the policy's least.

        Raises
        ------
        BudgetError
            Naming both numbers.
        """
        if noise_multiplier < self.min_noise_multiplier:
            raise BudgetError(
                f"site {self.site}: a noise multiplier of {noise_multiplier:.3f} is below its policy's "
                f"least, {self.min_noise_multiplier:g}; use a smaller epsilon or fewer steps.",
                public=f"site {self.site}: less noise than its policy's least; use a smaller epsilon or "
                "fewer steps.",
            )

    def require_delta(self, units: int) -> None:
        """Refuse a budget at a delta that would let one record be published outright.

        Raises
        ------
        BudgetError
            If ``max_delta >= 1 / units``.
        """
        if not self.max_delta < 1 / units:
            raise BudgetError(
                f"site {self.site}: its policy's max_delta={self.max_delta:g} must be below one over its "
                f"{units} records.",
                public=f"site {self.site}: its policy's max_delta does not fit its records.",
            )


def names_a_site(name: str) -> bool:
    """Return whether a name can be a site's: a folder's name, a cell of every table, and no reserved word."""
    return re.fullmatch(r"\w[\w .-]{0,63}", name) is not None and name not in RESERVED


def load_policy(path: Path) -> SitePolicy:
    """Read a policy file; relative paths in it are taken from its folder.

    Raises
    ------
    ConfigError
        If the file is missing, not TOML, or holds an unknown or wrongly typed key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such site policy (node-config policy=PATH).") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a readable site policy: {error}.") from None
    known = {item.name: item for item in fields(SitePolicy)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key '{key}'; known are {', '.join(known)}.")
        kind = str(known[key].type)
        if kind == "float" and type(value) is int:
            try:
                values[key] = value = float(value)
            except OverflowError:
                raise ConfigError(f"{path}: {key} must be a smaller number.") from None
        if type(value).__name__ != kind:
            raise ConfigError(f"{path}: {key} needs a value of type {kind}.")
    if not values.get("site"):
        raise ConfigError(f"{path}: the key 'site' (the site's name in the run) is missing.")
    if not names_a_site(values["site"]):
        raise ConfigError(f"{path}: site = '{values['site']}' cannot name a site: {SITE_NAMES}.")
    for key, most in _NUMBERS.items():
        # nan is in no range
        if not 0 <= values.get(key, 0) <= most:
            allowed = "not be below 0" if most == math.inf else f"lie between 0 and {most:g}"
            raise ConfigError(f"{path}: {key} must {allowed}, got {values[key]}.")
    if values.get("heldout_path") and values.get("private_heldout_path"):
        raise ConfigError(f"{path}: heldout_path and private_heldout_path exclude each other.")
    for key in _PATHS:
        if values.get(key) or key == "state_dir":
            values[key] = str(path.parent / values.get(key, "state"))
    return SitePolicy(**values)
