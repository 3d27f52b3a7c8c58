"""Commands about a site's privacy budget: show, plan, verify."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedllm.cli.recipes import Overrides, whole_sites_table
from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.resources import find_recipe

if TYPE_CHECKING:
    from fedllm.federation.budget import Book

app = typer.Typer(help="What a site has spent of its privacy budget.", no_args_is_help=True)
console = Console(highlight=False)
BOOKS_HELP = "A site's policy file, or a run folder of simulated sites."


@app.command()
def show(
    paths: Annotated[list[Path], typer.Argument(help=BOOKS_HELP)],
    picture: Annotated[
        Path | None, typer.Option(help="Also draw epsilon over the rounds, as a png or svg file.")
    ] = None,
) -> None:
    """Show every run's spending, and what it comes to; of several sites also for a unit at all of them."""
    from fedllm.federation.budget import open_books, shared_epsilon

    curves: dict[str, list[float]] = {}
    books = [book for path in paths for book in open_books(path)]
    for book in books:
        if not book.datasets():
            policy = book.policy
            limit = f"epsilon {policy.max_epsilon:g} at delta {policy.max_delta:g}"
            console.print(f"{policy.site}: nothing spent of {limit}", markup=False)
        for dataset in book.datasets():
            console.print(_spending(book, dataset))
            if picture is not None:
                entries = book.entries(dataset)
                totals = [book.spent(entries[: count + 1]) for count in range(len(entries))]
                curves[f"{book.policy.site}, {dataset}"] = totals
    shared = shared_epsilon(books)
    if shared is not None:
        console.print(
            f"a patient or customer with records at all {len(books)} sites: epsilon {shared[0]:.3f} at delta "
            f"{shared[1]:g}, all spends composed",
            soft_wrap=True,
        )
    if picture is not None:
        from fedllm.runs.plots import save_epsilon_picture

        limits = {book.policy.max_epsilon for book in books}
        save_epsilon_picture(picture, curves, limit=max(limits))
        console.print(f"picture: {picture}", markup=False)


def _spending(book: Book, dataset: str) -> Table:
    entries = book.entries(dataset)
    policy = book.policy
    table = Table(
        "run",
        "rounds",
        "steps",
        "noise multiplier",
        "epsilon of the run",
        "epsilon in all",
        title=escape(f"{policy.site}, data set '{dataset}'"),
        title_justify="left",
        box=None,
    )
    done = entries[:0]
    for run, group in groupby(entries, key=lambda entry: entry.run):
        own = tuple(group)
        done += own
        noise = sorted({round(entry.noise_multiplier, 3) for entry in own})
        table.add_row(
            run,
            str(len(own)),
            str(sum(entry.steps for entry in own)),
            ", ".join(f"{value:g}" for value in noise),
            f"{book.spent(own):.3f}",
            f"{book.spent(done):.3f}",
        )
    relations = ", ".join(sorted({entry.relation for entry in entries}))
    table.caption = (
        f"of epsilon {policy.max_epsilon:g} at delta {policy.max_delta:g}; {relations}, Poisson, PLD. "
        "A crash counts as spent."
    )
    table.caption_justify = "left"
    return table


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe that ships, or a file.")],
    overrides: Overrides = None,
    policy: Annotated[
        Path | None, typer.Option(help="A real site's policy; default: the sites as simulated.")
    ] = None,
) -> None:
    """Show what a recipe would spend, and how many rounds are left at its noise."""
    config = Config.from_toml(find_recipe(recipe), overrides or [])
    if not (config.privacy.enabled or config.site_privacy.enabled):
        raise ConfigError(
            f"{recipe}: privacy.enabled=false, site_privacy.enabled=false, so it spends nothing and promises "
            "nothing."
        )
    if config.federation.mode == "base":
        raise ConfigError(f"{recipe}: federation.mode=base trains nothing, so it spends nothing.")
    from fedllm.federation.plan import check_recipe

    check_recipe(config)
    if config.privacy.enabled:
        console.print(_planned_records(config, policy))
    if config.site_privacy.enabled:
        console.print(whole_sites_table(config))


def _planned_records(config: Config, policy: Path | None) -> Table:
    from fedllm.federation.budget import counts_epsilon, planned_shared, planned_sites, rounds_left

    table = Table(
        "site", "noise multiplier", "steps", "epsilon", "PRV", "RDP", "spent before", "rounds that fit"
    )
    table.box = None
    sites = planned_sites(config, policy)
    for found in sites:
        left = rounds_left(found.held, found.plan.spend(), policy=found.policy, relation=found.plan.relation)
        table.add_row(
            found.policy.site,
            f"{found.plan.noise_multiplier:.3f}",
            str(found.plan.spend(rounds=found.plan.rounds).steps),
            f"{found.epsilon:.3f}",
            f"{found.peers['PRV']:.3f}",
            f"{found.peers['RDP']:.3f}",
            f"{found.before:.3f}",
            f"{left:,}, {found.plan.rounds:,} planned",
        )
    table.caption = (
        f"epsilon by PLD at delta {config.privacy.delta:g}, {config.privacy.relation}; PRV and RDP "
        "are the same run by other accountants, add-or-remove-one"
    )
    if len(sites) > 1:
        table.caption += (
            f"; {planned_shared(config, sites):.3f} for a unit with records at all {len(sites)} sites"
        )
    heldout = counts_epsilon(config)
    if heldout is not None:
        table.caption += f"; counts over private held-out records spend {heldout:.3f} of those records' own"
    table.caption_justify = "left"
    return table


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help=BOOKS_HELP)],
    head: Annotated[str, typer.Option(help="A hash of the ledger that was noted elsewhere.")] = "",
) -> None:
    """Check that a ledger is whole, unaltered, and not older than a hash noted elsewhere."""
    from fedllm.federation.budget import open_books

    for book in open_books(path):
        entries = book.ledger.entries()
        if head:
            book.ledger.require_head(head)
        console.print(
            f"{book.policy.site}: {len(entries)} spends, an unbroken chain; head {book.ledger.head}",
            soft_wrap=True,
            markup=False,
        )
