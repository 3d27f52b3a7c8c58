"""The command that compares methods: it runs what is missing, then writes one table and one picture."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedllm.cli.comparison import nearest, read_comparison
from fedllm.cli.jobs import Comparison, Job, core_shares, plan, run_all
from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from fedllm.runs.outcomes import Outcome

console = Console(highlight=False)

#: Columns that the terminal has no room for.
LEFT_OUT = ("group", "seeds", "up", "down", "seconds")


def compare(
    file: Annotated[Path, typer.Argument(help="A comparison: a TOML file.")],
    dir: Annotated[
        Path | None, typer.Option(help="Folder of runs, table and picture; default: runs/NAME, here.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Other seeds than the file's, such as 1,2.")] = "",
    only: Annotated[
        list[str] | None, typer.Option(help="Run this cell only (repeatable); the table keeps all.")
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", help="Runs side by side; each gets its part of the cores.")
    ] = 1,
    figures: Annotated[
        Path | None, typer.Option(help="Write table and picture from this compare.csv; run nothing.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list the runs; run nothing.")
    ] = False,
) -> None:
    """Run methods over seeds and groups, and write one table and one picture of them.

    What has finished with the same settings is not run again, what was interrupted goes on. The file:

    \b
    recipe = "demo/icd10-fedsb"     # one that ships, or a path from this file
    seeds = \\[1, 2, 3]
    metric = "accuracy"             # shown; or macro_f1, exact_match, token_f1, rouge_l, loss
    title = "LoRA methods"          # optional
    minutes = 40                    # optional: how long it takes, shown before it starts

    \b
    \\[settings]                      # optional: for every run, written as in a recipe
    federation.rounds = 5

    \b
    \\[baselines]                     # optional; local and central are run
    chance = true
    base = true
    majority = true
    local = true
    central.settings.train.lr = 1e-3  # true, or what it sets for itself

    \b
    \\[\\[cells]]                       # one a method
    name = "FedIT r=16"
    settings.adapter.method = "lora"
    settings.strategy.name = "fedit"

    \b
    \\[\\[groups]]                      # optional: every cell runs in every group
    name = "IID"
    settings.data.partition = "iid"
    """
    comparison = read_comparison(file, seeds=seeds)
    folder = (dir or Path("runs") / file.stem).expanduser().resolve()
    core_shares(jobs)
    planned = plan(comparison, file, folder)
    wanted = _only(planned, only or [], file)
    chance = _chance(comparison, planned, file)
    if figures is not None:
        _write(comparison, planned, folder, chance=chance, source=file.read_bytes(), figures=figures)
        return
    states = {job.name: job.state() for job in planned}
    if comparison.minutes:
        console.print(f"about {comparison.minutes:g} min when nothing has been run", markup=False)
    if dry_run:
        for job in wanted:
            state = states[job.name]
            text = "" if state == "finished" else f": {shlex.join(['fedllm', *job.command(state)])}"
            console.print(f"{state:>10}  {job.name}{text}", soft_wrap=True, markup=False)
        return
    try:
        failures = run_all([job for job in wanted if states[job.name] != "finished"], states, at_once=jobs)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        raise
    _write(comparison, planned, folder, chance=chance, source=file.read_bytes())
    for name, reason in failures.items():
        console.print(f"failed: {name}: {reason}", style="red", soft_wrap=True, markup=False)
    if failures:
        raise typer.Exit(1)


def _write(
    comparison: Comparison,
    jobs: Sequence[Job],
    folder: Path,
    *,
    chance: dict[str, float],
    source: bytes,
    figures: Path | None = None,
) -> None:
    from fedllm.runs.compare import columns, row_cells, write_comparison
    from fedllm.runs.manifest import config_digest

    done = _finished(jobs, comparison.metric) if figures is None else _read(jobs, figures)
    if not done:
        console.print("no run has finished; there is nothing to compare")
        return
    folder.mkdir(parents=True, exist_ok=True)
    aside = [] if figures is not None else set_aside([job for job in jobs if job.name in done])
    rows = write_comparison(
        folder,
        list(done.values()),
        title=comparison.title,
        metric=comparison.metric,
        baselines=comparison.baselines,
        chance=chance,
        missing=[job.name for job in jobs if job.name not in done],
        aside=aside,
        source=source,
        # of figures alone nobody knows the settings they came from
        digests={}
        if figures is not None
        else {
            job.folder.relative_to(folder).as_posix(): config_digest(job.config)
            for job in jobs
            if job.name in done
        },
    )
    for group in dict.fromkeys(row.group for row in rows):
        title = group if len(comparison.groups) > 1 else comparison.title
        table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
        heads = columns(comparison.metric)
        for column in (head for head in heads if head not in LEFT_OUT):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in (row for row in rows if row.group == group):
            cells = zip(heads, row_cells(row, comparison.metric), strict=True)
            table.add_row(*(escape(cell) for head, cell in cells if head not in LEFT_OUT))
        console.print(table)
    for text in aside:
        console.print(f"replies were set aside: {text}", style="yellow", soft_wrap=True, markup=False)
    console.print(
        f"\ntable:   {folder / 'compare.md'}\npicture: {folder / 'compare.png'}", soft_wrap=True, markup=False
    )


def _finished(jobs: Sequence[Job], metric: str) -> dict[str, Outcome]:
    """Return what the runs measured that have finished, by their names."""
    from fedllm.runs.folder import open_run
    from fedllm.runs.outcomes import read_outcome

    return {
        job.name: read_outcome(
            open_run(job.folder), group=job.group, method=job.cell, seed=job.seed, metric=metric
        )
        for job in jobs
        if job.state() == "finished"
    }


def set_aside(jobs: Sequence[Job]) -> list[str]:
    """Return the runs in which replies were set aside, each with the sites they came from."""
    from fedllm.runs.events import read_events
    from fedllm.runs.folder import open_run

    found = []
    for job in jobs:
        events = read_events(open_run(job.folder))
        sites = {e["site"] for e in events if e["event"] == "site_reply" and not e["accepted"]}
        found += [f"{job.name} ({', '.join(sorted(sites))})"] if sites else []
    return found


def _read(jobs: Sequence[Job], figures: Path) -> dict[str, Outcome]:
    """Return what a csv file holds of the runs, by their names."""
    from fedllm.runs.figures import read_figures
    from fedllm.runs.measures import base_name

    planned = {(job.group, job.cell, job.seed): job for job in jobs}
    found = read_figures(figures, {key: base_name(job.config) for key, job in planned.items()})
    return {planned[run.group, run.method, run.seed].name: run for run in found}


def _chance(comparison: Comparison, jobs: Sequence[Job], file: Path) -> dict[str, float]:
    """Return group -> accuracy of guessing among its labels, where the comparison asks for it."""
    if "chance" not in comparison.baselines:
        return {}
    from fedllm.data.sources import public_labels

    groups = {job.group: job.config.data for job in jobs}
    if comparison.metric != "accuracy" or any(data.task != "classify" for data in groups.values()):
        raise ConfigError(
            f'{file}: baselines.chance is for metric = "accuracy" and a recipe with data.task=classify.'
        )
    return {group: 1 / len(public_labels(data)) for group, data in groups.items()}


def _only(jobs: Sequence[Job], names: Sequence[str], file: Path) -> list[Job]:
    known = list(dict.fromkeys(job.cell for job in jobs))
    for name in names:
        if name not in known:
            raise ConfigError(f"--only: {file} has no cell '{name}'.{nearest(name, known)}")
    return [job for job in jobs if not names or job.cell in names]
