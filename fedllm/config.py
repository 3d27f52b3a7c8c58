"""A run's settings, read and checked: :mod:`fedllm.settings` <-> Flower's flat run config.

A recipe is a TOML file with one table a section (``[train]``, ``[privacy]``, ...). Flower
flattens it to dotted keys with scalar values (``train.lr``), and that flat form is what travels.
``python -m fedllm.config`` writes the defaults into the ``[tool.flwr.app.config]`` tables.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import tomli_w

from fedllm.choices import added_choices
from fedllm.combinations import require_together
from fedllm.errors import ConfigError
from fedllm.settings import (
    TRACKERS,
    AdapterSettings,
    DataSettings,
    EvaluationSettings,
    FederationSettings,
    ModelSettings,
    PrivacySettings,
    RunSettings,
    Scalar,
    SitePrivacySettings,
    StrategySettings,
    TrainSettings,
    WireSettings,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one run.

    Raises
    ------
    ConfigError
        From the constructors below, naming the first key that is unknown, out of range or
        contradicts another.
    """

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings = DataSettings()
    federation: FederationSettings = FederationSettings()
    train: TrainSettings = TrainSettings()
    privacy: PrivacySettings = PrivacySettings()
    site_privacy: SitePrivacySettings = SitePrivacySettings()
    strategy: StrategySettings = StrategySettings()
    wire: WireSettings = WireSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def private_replies(self) -> bool:
        """Return whether a promise holds towards the coordinator: beside updates nothing leaves in clear."""
        return self.privacy.enabled or self.site_privacy.at_sites

    @property
    def site_steps(self) -> int:
        """Return the steps of a round at a site that trains: pooled records get those of all drawn sites."""
        pooled = self.federation.drawn if self.federation.mode == "central" else 1
        return self.train.local_steps * pooled

    @staticmethod
    def from_flat(values: Mapping[str, Scalar]) -> Config:
        """Build from dotted keys; keys left out keep their defaults."""
        tables: dict[str, dict[str, Scalar]] = {}
        for key, value in values.items():
            known = SETTINGS.get(key)
            if known is None:
                raise ConfigError(_unknown(key, SETTINGS))
            section, name = key.split(".")
            tables.setdefault(section, {})[name] = _coerce(key, value, known)
        sections = {
            part.name: dataclasses.replace(part.default, **tables.get(part.name, {}))  # type: ignore[type-var]
            for part in fields(Config)
        }
        config = Config(**sections)  # type: ignore[arg-type]
        require_together(config)
        site_ranks(config)
        trackers(config)
        return config

    @staticmethod
    def from_toml(path: str | Path, overrides: Iterable[str] = ()) -> Config:
        """Read a recipe and apply ``key=value`` overrides to it."""
        return Config.from_flat(read_toml(path) | parse_overrides(overrides))

    def to_flat(self) -> dict[str, Scalar]:
        """Return all settings as dotted keys."""
        return {
            f"{part.name}.{item.name}": getattr(getattr(self, part.name), item.name)
            for part in fields(self)
            for item in fields(getattr(self, part.name))
        }

    def changed(self) -> dict[str, Scalar]:
        """Return the settings that differ from their defaults, as dotted keys."""
        return {key: value for key, value in self.to_flat().items() if value != SETTINGS[key].default}

    def replace(self, **dotted: Scalar) -> Config:
        """Return a copy with some settings changed; ``__`` stands for the dot."""
        return Config.from_flat(self.to_flat() | {k.replace("__", "."): v for k, v in dotted.items()})

    def to_toml(self) -> str:
        """Return all settings as the text of a recipe."""
        return tomli_w.dumps(dataclasses.asdict(self))


SETTINGS: dict[str, dataclasses.Field[Scalar]] = {
    f"{part.name}.{item.name}": item
    for part in fields(Config)
    for item in fields(part.default)  # type: ignore[arg-type]
}


def read_toml(path: str | Path) -> dict[str, Scalar]:
    """Read a TOML recipe into dotted keys.

    Raises
    ------
    ConfigError
        If the file is missing, not UTF-8 or not TOML.
    """
    file = Path(path)
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such recipe. `fedllm ls` shows the ones that ship.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start}).") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}.") from None
    flat: dict[str, Scalar] = {}
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: '{section}' stands outside a table such as [train].")
        flat |= {f"{section}.{name}": value for name, value in table.items()}
    return flat


def parse_overrides(pairs: Iterable[str]) -> dict[str, Scalar]:
    """Parse ``key=value`` words; a value is TOML where it can be, else a string.

    The value of a setting that is a text stays as it was written, but for quotes.

    >>> parse_overrides(["train.lr=3e-4", "run.dir=/tmp/a", "privacy.enabled=true"])
    {'train.lr': 0.0003, 'run.dir': '/tmp/a', 'privacy.enabled': True}
    """
    values: dict[str, Scalar] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{pair}' is not of the form key=value, such as train.lr=3e-4.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        is_text = key in SETTINGS and isinstance(SETTINGS[key].default, str)
        values[key] = value if isinstance(value, str if is_text else str | int | float | bool) else text
    return values


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else " `fedllm settings` lists all of them."
    return f"unknown setting '{key}'.{hint}"


def _coerce(key: str, value: Scalar, known: dataclasses.Field[Scalar]) -> Scalar:
    kind: type[Scalar] = type(known.default)  # type: ignore[assignment]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{key}: an integer of that many digits is too large.") from None
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{key}: needs a value of type {kind.__name__}, got {value!r}.")
    choices = (*known.metadata["choices"], *added_choices(key))
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"{key}: '{value}' is not one of {', '.join(choices)}.{hint}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = known.metadata["minimum"], known.metadata["maximum"]
        if not low <= value <= high or math.isinf(value):
            allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ConfigError(f"{key}: must be {allowed}, got {value}.")
    return value


def site_ranks(config: Config) -> tuple[int, ...]:
    """Return the ranks of the simulated sites in turn; ``adapter.rank`` is the largest.

    Raises
    ------
    ConfigError
        If ``adapter.site_ranks`` is not a list of numbers from 1 to ``adapter.rank``.
    """
    words = [word.strip() for word in config.adapter.site_ranks.split(",") if word.strip()]
    if not all(word.isdecimal() and 1 <= int(word) <= config.adapter.rank for word in words):
        raise ConfigError(
            f"adapter.site_ranks: '{config.adapter.site_ranks}' must be numbers from 1 to "
            f"adapter.rank={config.adapter.rank}, separated by commas."
        )
    return tuple(int(word) for word in words) or (config.adapter.rank,)


def trackers(config: Config) -> tuple[str, ...]:
    """Return the trackers that ``run.tracking`` names, each once.

    Raises
    ------
    ConfigError
        Naming the first one that is unknown.
    """
    words = [word.strip() for word in config.run.tracking.split(",")]
    names = tuple(dict.fromkeys(word for word in words if word not in ("", "none")))
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"run.tracking: '{name}' is not one of none, {', '.join(TRACKERS)}.")
    return names


def write_app_config(pyproject: Path) -> None:
    """Rewrite the ``[tool.flwr.app.config]`` table of a pyproject file with the defaults."""
    begin, end = "# settings: begin (python -m fedllm.config)\n", "# settings: end\n"
    text = pyproject.read_text(encoding="utf-8")
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    table = tomli_w.dumps({"tool": {"flwr": {"app": {"config": dataclasses.asdict(Config())}}}})
    pyproject.write_text(head + begin + table + end + tail, encoding="utf-8")


def main() -> None:
    """Bring the Flower apps of this checkout up to date with the settings above."""
    root = Path(__file__).parent.parent
    for pyproject in (root / "pyproject.toml", root / "apps" / "finetune" / "pyproject.toml"):
        write_app_config(pyproject)


if __name__ == "__main__":
    main()
