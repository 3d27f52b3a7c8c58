"""Runs of a comparison: planned, told apart by what has finished, and run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import tomli_w
from rich.console import Console
from rich.markup import escape

from fedllm.config import Config, read_toml
from fedllm.errors import ConfigError, RunError
from fedllm.runs.folder import RunFolder, load_config, locked, open_run
from fedllm.runs.manifest import config_digest, read_manifest
from fedllm.settings import Scalar

console = Console(highlight=False)

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
        """Return finished, unfinished, changed (other settings or records), unreadable or missing."""
        from fedllm.runs.events import read_events

        try:
            run = open_run(self.folder)
        except RunError:
            return "missing"
        try:
            same = config_digest(load_config(run)) == config_digest(self.config)
            same = same and _same_records(run, self.config)
        except RunError:
            return "unreadable"
        if not same:
            return "changed"
        done = any(event["event"] == "run_finished" for event in read_events(run))
        return "finished" if done else "unfinished"

    def command(self, state: str) -> list[str]:
        """Return the words of ``fedllm`` that run it, or go on with it where it is unfinished."""
        words = [f"run.resume={self.folder}"] if state == "unfinished" else _words(self.changes)
        return ["run", str(self.recipe), *words, "--engine", "process"]


def _same_records(run: RunFolder, config: Config) -> bool:
    """Return whether a run had the records that its file has now; a file that is older has them."""
    from fedllm.data.sites import simulated_sites

    path, manifest = Path(config.data.path).expanduser(), read_manifest(run)
    if not path.is_file() or manifest is None:
        return True
    if path.stat().st_mtime <= datetime.fromisoformat(manifest["time"]).timestamp():
        return True
    sites, pooled = config.federation.sites, config.federation.mode == "central"
    found = simulated_sites(config.data, sites=sites, seed=config.run.seed, pooled=pooled)
    return bool({site.name: site.fingerprint for site in found} == manifest["data"])


def plan(comparison: Comparison, file: Path, folder: Path) -> list[Job]:
    """Return all runs of a comparison, by group, cell and seed.

    Raises
    ------
    ConfigError
        If settings are unknown or contradict each other, naming cell and group.
    """
    from fedllm.federation.plan import as_run, check_recipe

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
                        # as the run's folder will hold them
                        config=as_run(config),
                    )
                )
    return jobs


@dataclass(frozen=True)
class _Running:
    """A run that has been started."""

    head: str
    job: Job
    process: BaseProcess
    cores: frozenset[int]
    since: float


def run_all(jobs: Sequence[Job], states: Mapping[str, str], *, at_once: int = 1) -> dict[str, str]:
    """Run them, ``at_once`` side by side on as many parts of the cores; return why each failed that did."""
    failures: dict[str, str] = {}
    waiting = deque(enumerate(jobs, start=1))
    free = core_shares(at_once)
    running: list[_Running] = []
    try:
        with console.status("") as status:
            while waiting or running:
                while waiting and free:
                    number, job = waiting.popleft()
                    state = states[job.name]
                    head = f"[{number}/{len(jobs)}] {job.name}{_note(job, state)}"
                    try:
                        process = _start(job, state, free[-1])
                    except (OSError, EOFError, RunError) as error:
                        failures[job.name] = str(error) or type(error).__name__
                        console.print(f"{head}: failed", soft_wrap=True, markup=False)
                    else:
                        running.append(_Running(head, job, process, free.pop(), time.monotonic()))
                if not running:
                    # the last of them could not begin, and waiting for nothing would never end
                    break
                status.update(escape("\n".join(run.head for run in running)))
                connection.wait([run.process.sentinel for run in running])
                for run in [run for run in running if run.process.exitcode is not None]:
                    running.remove(run)
                    free.append(run.cores)
                    reason = _reason(run)
                    if reason:
                        failures[run.job.name] = reason
                    outcome = f"{'failed' if reason else 'done'}, {time.monotonic() - run.since:.0f} s"
                    console.print(f"{run.head}: {outcome}", soft_wrap=True, markup=False)
    except BaseException as error:
        # a terminal interrupts the runs, too
        deadline = time.monotonic() + (GRACE_SECONDS if isinstance(error, KeyboardInterrupt) else 0)
        for run in running:
            run.process.join(max(0.0, deadline - time.monotonic()))
            run.process.terminate()
        raise
    return failures


def core_shares(parts: int) -> list[frozenset[int]]:
    """Return this process' cores in equal parts, so that runs side by side do not wait for each other.

    Raises
    ------
    ConfigError
        If there are fewer cores than parts.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= parts <= len(cores):
        raise ConfigError(f"--jobs must be 1 to {len(cores)}, the cores of this machine; got {parts}.")
    return [frozenset(cores[part::parts]) for part in range(parts)]


def _note(job: Job, state: str) -> str:
    if state == "changed":
        return f": anew, its settings changed ({_difference(job)}); the old run is kept as {_aside(job).name}"
    if state == "unreadable":
        return f": anew, the old run's settings cannot be read; it is kept as {_aside(job).name}"
    return ": goes on" if state == "unfinished" else ""


def _aside(job: Job) -> Path:
    """Return where a run is moved whose folder is needed for another one."""
    names = (job.folder.with_name(f"{job.folder.name}.{number}") for number in itertools.count(1))
    return next(path for path in names if not path.exists())


def _start(job: Job, state: str, cores: frozenset[int]) -> BaseProcess:
    if state in ("changed", "unreadable"):
        with locked(RunFolder(job.folder)):
            job.folder.rename(_aside(job))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.log.unlink(missing_ok=True)
    # forked from a process that has imported everything once: imports take longer than a small run
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=run_logged, args=(job.command(state), str(job.log), cores))
    process.start()
    return process


def _reason(run: _Running) -> str:
    """Return why a run that ended failed, or ''."""
    code, log = run.process.exitcode, run.job.log
    if code == 0:
        return ""
    # a run that was killed at once has not begun to write
    printed = log.read_text(errors="replace") if log.is_file() else ""
    said = [line for line in printed.splitlines() if line.startswith("error: ")]
    return said[-1].removeprefix("error: ") if said else f"ended with exit code {code}; see {log}"


def run_logged(words: list[str], log: str, cores: frozenset[int]) -> None:
    """Run ``fedllm`` with these words in this process, on these cores, all it prints going to a file."""
    from fedllm.cli.app import main

    os.sched_setaffinity(0, cores)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = ["fedllm", *words]
    main()


def _end_with_parent() -> None:
    """End this run when what started it was killed: nobody would see it train on."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "run_logged is the target of a process"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


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
    """Say which setting of a finished or begun run differs first, or that its records do."""
    before = load_config(open_run(job.folder)).to_flat()
    now = job.config.to_flat()
    key = next((key for key in now if key != "run.dir" and before[key] != now[key]), "")
    return f"{key}: {before[key]!r}, now {now[key]!r}" if key else "the records of data.path"
