"""Commands about recipes and settings: ls, cp, settings, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedllm.choices import added_choices
from fedllm.config import SETTINGS, Config
from fedllm.errors import ConfigError
from fedllm.resources import find_recipe, recipe_names, recipes_dir

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, as key=value, such as train.lr=1e-3.")
]
console = Console()


def list_recipes() -> None:
    """List the recipes that ship, with a line each."""
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("what it does")
    for name in recipe_names():
        first = (recipes_dir() / f"{name}.toml").read_text(encoding="utf-8").partition("\n")[0]
        table.add_row(name, first.removeprefix("# "))
    console.print(table)


def copy(
    recipe: Annotated[str, typer.Argument(help="A recipe that ships, or a file.")],
    target: Annotated[Path | None, typer.Argument(help="File to write; default: its name, here.")] = None,
) -> None:
    """Copy a recipe to a file of your own."""
    source = find_recipe(recipe)
    path = target or Path(source.name)
    if path.is_dir():
        path = path / source.name
    if path.exists():
        raise ConfigError(f"{path}: exists already; choose another name.")
    try:
        path.write_bytes(source.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from None
    print(path)


def settings(
    section: Annotated[str, typer.Argument(help="Show this section only, such as train.")] = "",
) -> None:
    """List all settings with their defaults and meaning."""
    known = sorted({key.partition(".")[0] for key in SETTINGS})
    if section and section not in known:
        raise ConfigError(f"no section '{section}'; there are {', '.join(known)}.")
    table = Table(box=None, pad_edge=False)
    table.add_column("setting", style="bold", no_wrap=True)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning")
    for key, item in SETTINGS.items():
        if not section or key.startswith(f"{section}."):
            choices = (*item.metadata["choices"], *added_choices(key))
            text = item.metadata["help"] + (f" [{' | '.join(choices)}]" if choices else "")
            table.add_row(key, str(item.default) if item.default != "" else "-", text.replace("[", "\\["))
    console.print(table)


def check(
    recipe: Annotated[str, typer.Argument(help="A recipe that ships, or a file.")],
    overrides: Overrides = None,
) -> None:
    """Validate a recipe, and estimate its bytes, privacy and memory before anything runs."""
    config = Config.from_toml(find_recipe(recipe), overrides or [])
    from fedllm.federation.estimate import estimate

    found = estimate(config)
    chosen = Table("setting", "value", title="settings that differ from their defaults", box=None)
    for key, value in config.changed().items():
        chosen.add_row(key, escape(str(value)))
    console.print(chosen)
    facts = Table(title="estimate", box=None, show_header=False)
    facts.add_row("adapted matrices", f"{found.modules:,}")
    facts.add_row("trained numbers", f"{found.trained:,}")
    facts.add_row("bytes a site and round", f"{found.bytes_up:,} up, {found.bytes_down:,} down")
    facts.add_row("one-off bytes a site", f"{found.one_off:,}")
    facts.add_row("memory of a site", f"about {found.memory_mib:,} MiB")
    console.print(facts)
    if config.site_privacy.enabled:
        console.print(whole_sites_table(config))
    if config.federation.mode == "base":
        console.print("federation.mode=base: nothing trains, and nothing is spent")
        return
    if not found.sites:
        console.print("records and privacy: known at the sites alone (data.source=file without data.path)")
        return
    columns = ["site", "training records"]
    if config.privacy.enabled:
        columns += ["sample rate", "noise multiplier", f"epsilon at delta={config.privacy.delta:g}"]
    table = Table(*columns, title="sites as simulated", box=None)
    for site in found.sites:
        row = [site.name, f"{site.records:,}"]
        if site.plan is not None:
            row += [
                f"{site.plan.sample_rate:.4f}",
                f"{site.plan.noise_multiplier:.3f}",
                f"{site.epsilon:.2f}",
            ]
        table.add_row(*row)
    console.print(table)


def whole_sites_table(config: Config) -> Table:
    """Return what a recipe promises whole sites, towards whom, and what that takes."""
    from fedllm.federation.site_privacy import planned_whole_sites
    from fedllm.runs.whole_sites import terms, towards

    planned = planned_whole_sites(config)
    table = Table(title="whole sites, as planned", box=None, show_header=False)
    table.add_row("rounds", f"{planned.rounds:,}")
    table.add_row("noise multiplier", f"{planned.noise_multiplier:.3f}")
    for name, value in (*towards(config, planned.spent), *terms(config)):
        table.add_row(name, value)
    return table
