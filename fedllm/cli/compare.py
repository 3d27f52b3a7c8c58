"""The command that compares methods: it runs what is missing, then writes one table and one picture."""

from __future__ import annotations

import difflib
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedllm.config import Config, Scalar, read_toml
from fedllm.errors import ConfigError, RunError
from fedllm.resources import find_recipe

console = Console(highlight=False)

TABLES = {
    "": ("title", "recipe", "seeds", "metric", "minutes", "settings", "baselines", "cells", "groups"),
    "baselines": ("base", "majority", "local", "central"),
    "cells": ("name", "settings"),
    "groups": ("name", "settings"),
}
#: Columns of the table that the terminal has room for.
SHOWN = ("method", "accuracy %", "macro-F1 %", "worst site %", "run total", "epsilon")
#: Settings of which every run has its own.
OWN = ("run.seed", "run.dir", "run.resume")
#: Seconds an interrupted run gets to write down where it stopped.
GRACE_SECONDS = 20
#: What every run imports.
PRELOADED = (
    "fedllm.cli.app",
    "fedllm.federation.inprocess",
    "fedllm.runs.report",
    "transformers.models.auto",
)


@dataclass(frozen=True)
class Variant:
    """A named set of settings: a cell, a group, or a baseline that is run."""

    name: str
    settings: Mapping[str, Scalar]

    @property
    def folder(self) -> str:
        """Return the name as a folder's."""
        return re.sub(r"[^\w.]+", "-", self.name).strip("-.").lower()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison's file, checked."""

    title: str
    recipe: Path
    seeds: tuple[int, ...]
    metric: str
    minutes: float | None
    settings: Mapping[str, Scalar]
    baselines: tuple[str, ...]
    cells: tuple[Variant, ...]
    groups: tuple[Variant, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a comparison.

    Attributes
    ----------
    changes : Mapping[str, Scalar]
        What it changes in the recipe.
    config : Config
        All its settings.
    """

    group: str
    cell: str
    seed: int
    recipe: Path
    folder: Path
    changes: Mapping[str, Scalar]
    config: Config

    @property
    def name(self) -> str:
        """Return what the run is called on the terminal."""
        return f"{self.group}, {self.cell}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """Return the file with what the run printed, beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def state(self) -> str:
        """Return finished, unfinished, changed (run with other settings) or missing."""
        from fedllm.runs.events import read_events
        from fedllm.runs.folder import load_config, open_run

        try:
            run = open_run(self.folder)
        except RunError:
            return "missing"
        try:
            same = load_config(run).replace(run__dir=self.config.run.dir) == self.config
        except RunError:
            return "changed"
        if not same:
            return "changed"
        done = any(event["event"] == "run_finished" for event in read_events(run))
        return "finished" if done else "unfinished"

    def command(self, state: str) -> list[str]:
        """Return the words of ``fedllm`` that run it, or go on with it where it is unfinished."""
        words = [f"run.resume={self.folder}"] if state == "unfinished" else _words(self.changes)
        return ["run", str(self.recipe), *words, "--engine", "process"]


def compare(
    file: Annotated[Path, typer.Argument(help="A comparison: a TOML file.")],
    dir: Annotated[
        Path | None, typer.Option(help="Folder of runs, table and picture; default: runs/NAME, here.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Other seeds than the file's, such as 1,2.")] = "",
    only: Annotated[
        list[str] | None, typer.Option(help="Run this cell only (repeatable); the table keeps all.")
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
    metric = "accuracy"             # or macro_f1: what the picture shows
    title = "LoRA methods"          # optional
    minutes = 40                    # optional: how long it takes, shown before it starts

    \b
    \\[settings]                      # optional: for every run, written as in a recipe
    federation.rounds = 5

    \b
    \\[baselines]                     # optional; local and central are run
    base = true
    majority = true
    local = true
    central = true

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
    jobs = plan(comparison, file, folder)
    wanted = _only(jobs, only or [], file)
    states = {job.name: job.state() for job in jobs}
    if comparison.minutes:
        console.print(f"about {comparison.minutes:g} min when nothing has been run", markup=False)
    if dry_run:
        for job in wanted:
            state = states[job.name]
            text = "" if state == "finished" else f": {shlex.join(['fedllm', *job.command(state)])}"
            console.print(f"{state:>10}  {job.name}{text}", soft_wrap=True, markup=False)
        return
    failures = _run_all([job for job in wanted if states[job.name] != "finished"], states)
    _write(comparison, jobs, folder, source=file.read_bytes())
    for name, reason in failures.items():
        console.print(f"failed: {name}: {reason}", style="red", soft_wrap=True, markup=False)
    if failures:
        raise typer.Exit(1)


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
    from fedllm.runs.compare import BASELINES, METRICS

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
    chosen = tuple(key for key in BASELINES if _typed(baselines, key, bool, file, False))
    run = [Variant(BASELINES[key], {"federation.mode": key}) for key in chosen if key in ("local", "central")]
    cells = _variants(values, "cells", file)
    _require_distinct([*cells, *(Variant(name, {}) for name in BASELINES.values())], "cells", file)
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
        baselines=chosen,
        cells=(*cells, *run),
        groups=groups,
    )


def plan(comparison: Comparison, file: Path, folder: Path) -> list[Job]:
    """Return all runs of a comparison, by group, cell and seed.

    Raises
    ------
    ConfigError
        If settings are unknown or contradict each other, naming cell and group.
    """
    from fedllm.federation.plan import check_recipe

    jobs = []
    recipe = read_toml(comparison.recipe)
    for group in comparison.groups:
        for cell in comparison.cells:
            changes = {**comparison.settings, **group.settings, **cell.settings}
            for seed in comparison.seeds:
                path = folder / group.folder / cell.folder / str(seed)
                own = changes | {"run.seed": seed, "run.dir": str(path)}
                try:
                    config = Config.from_flat(recipe | own)
                    found = _absolute(config)
                    config = Config.from_flat(config.to_flat() | found)
                    check_recipe(config)
                except ConfigError as error:
                    raise ConfigError(f"{file}: cell '{cell.name}', group '{group.name}': {error}") from None
                jobs.append(
                    Job(
                        group=group.name,
                        cell=cell.name,
                        seed=seed,
                        recipe=comparison.recipe,
                        folder=path,
                        changes=own | found,
                        config=config,
                    )
                )
    return jobs


def _run_all(jobs: Sequence[Job], states: Mapping[str, str]) -> dict[str, str]:
    """Run one after another; return the reason of each that failed."""
    failures: dict[str, str] = {}
    for number, job in enumerate(jobs, start=1):
        state = states[job.name]
        notes = {"unfinished": ": goes on", "changed": f": anew, its settings changed ({_difference(job)})"}
        head = f"[{number}/{len(jobs)}] {job.name}{notes.get(state, '')}"
        start = time.monotonic()
        try:
            with console.status(escape(head)):
                reason = _run(job, state)
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on from here")
            raise
        if reason:
            failures[job.name] = reason
        outcome = "failed" if reason else "done"
        console.print(f"{head}: {outcome}, {time.monotonic() - start:.0f} s", soft_wrap=True, markup=False)
    return failures


def _run(job: Job, state: str) -> str:
    """Run one, and return why it failed, or ''."""
    if state == "changed":
        shutil.rmtree(job.folder)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # forked from a process that has imported everything once: imports take longer than a small run
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=run_logged, args=(job.command(state), str(job.log)))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        # a terminal interrupts both
        process.join(GRACE_SECONDS)
        process.terminate()
        raise
    code = process.exitcode
    if code == 0:
        return ""
    said = [line for line in job.log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return said[-1].removeprefix("error: ") if said else f"ended with exit code {code}; see {job.log}"


def run_logged(words: list[str], log: str) -> None:
    """Run ``fedllm`` with these words in this process, all it prints going to a file."""
    from fedllm.cli.app import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = ["fedllm", *words]
    main()


def _write(comparison: Comparison, jobs: Sequence[Job], folder: Path, *, source: bytes) -> None:
    from fedllm.runs.compare import COLUMNS, read_outcome, row_cells, write_comparison
    from fedllm.runs.folder import open_run
    from fedllm.runs.manifest import config_digest

    done = [job for job in jobs if job.state() == "finished"]
    if not done:
        console.print("no run has finished; there is nothing to compare")
        return
    rows = write_comparison(
        folder,
        [
            read_outcome(
                open_run(job.folder),
                group=job.group,
                method=job.cell,
                seed=job.seed,
                metric=comparison.metric,
            )
            for job in done
        ],
        title=comparison.title,
        metric=comparison.metric,
        baselines=comparison.baselines,
        missing=[job.name for job in jobs if job not in done],
        source=source,
        digests={job.folder.relative_to(folder).as_posix(): config_digest(job.config) for job in done},
    )
    for group in dict.fromkeys(row.group for row in rows):
        title = group if len(comparison.groups) > 1 else comparison.title
        table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
        for column in SHOWN:
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in (row for row in rows if row.group == group):
            cells = dict(zip(COLUMNS, row_cells(row), strict=True))
            table.add_row(*(escape(cells[column]) for column in SHOWN))
        console.print(table)
    console.print(
        f"\ntable:   {folder / 'compare.md'}\npicture: {folder / 'compare.png'}", soft_wrap=True, markup=False
    )


def _words(changes: Mapping[str, Scalar]) -> list[str]:
    """Return settings as ``key=value`` words that read back as the same values."""
    return [
        f"{key}={tomli_w.dumps({'value': value}).partition('=')[2].strip()}" for key, value in changes.items()
    ]


def _absolute(config: Config) -> dict[str, Scalar]:
    """Return the settings that name a file or folder, as ``fedllm run`` keeps them."""
    named = {key: str(value) for key, value in config.to_flat().items() if key.endswith(("path", ".init"))}
    return {key: str(Path(value).expanduser().resolve()) for key, value in named.items() if value}


def _difference(job: Job) -> str:
    """Say which setting of a finished or begun run differs first."""
    from fedllm.runs.folder import load_config, open_run

    try:
        before = load_config(open_run(job.folder)).to_flat()
    except RunError:
        return "config.toml is of another version"
    now = job.config.to_flat()
    key = next((key for key in now if key != "run.dir" and before[key] != now[key]), "")
    return f"{key}: {before[key]!r}, now {now[key]!r}" if key else ""


def _only(jobs: Sequence[Job], names: Sequence[str], file: Path) -> list[Job]:
    known = list(dict.fromkeys(job.cell for job in jobs))
    for name in names:
        if name not in known:
            raise ConfigError(f"--only: {file} has no cell '{name}'.{_nearest(name, known)}")
    return [job for job in jobs if not names or job.cell in names]


def _load(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
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
            raise ConfigError(f"{file}: unknown key '{key}'{where}.{_nearest(key, TABLES[name])}")


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else f" There are {', '.join(known)}."


def _typed(table: Mapping[str, Any], key: str, kind: Any, file: Path, default: Any = None) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = {str: "a text", dict: "a table", bool: "true or false", list: "a list"}.get(kind, "a number")
        raise ConfigError(f"{file}: '{key}' must be {wanted}, got {value!r}.")
    return value


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
