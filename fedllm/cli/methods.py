"""Commands about methods: what there is and what it declares, and what it costs in bytes."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedllm.cli.recipes import Overrides
from fedllm.config import Config, parse_overrides, read_toml
from fedllm.resources import find_recipe

console = Console(highlight=False)


def methods() -> None:
    """List adapters, aggregation rules, server optimisers and codecs with what they declare."""
    from fedllm.federation.catalogue import catalogue

    for title, columns, rows in catalogue():
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, style="bold" if index == 0 else "", no_wrap=index == 0)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def compare_bytes(
    recipe: Annotated[str, typer.Argument(help="A recipe that ships, or a file.")],
    overrides: Overrides = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="key=value of the method to compare with, repeatable: --against adapter.method=lora "
            "--against strategy.name=fedit"
        ),
    ] = None,
) -> None:
    """Bytes of a recipe's adapter against another one's, and the round from which it has sent less."""
    from fedllm.federation.estimate import break_even, estimate_bytes

    values = read_toml(find_recipe(recipe)) | parse_overrides(overrides or [])
    ours = estimate_bytes(Config.from_flat(values))
    table = Table(box=None, pad_edge=False)
    for column in ("", "trained numbers", "once", "up a round", "down a round"):
        table.add_column(column, justify="right" if column else "left")
    rows = [("this recipe", ours)]
    if against:
        other = estimate_bytes(Config.from_flat(values | parse_overrides(against)))
        rows.append((" ".join(against), other))
    for name, found in rows:
        numbers = (found.trained, found.one_off, found.bytes_up, found.bytes_down)
        table.add_row(name, *(f"{number:,}" for number in numbers))
    console.print(table)
    if against:
        console.print(f"\n{break_even(ours, other)}")
