"""Commands about runs: run, show, report, export, generate, classify."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fedllm.cli.recipes import Overrides
from fedllm.cli.tables import Event, LiveRounds, final_table
from fedllm.config import Config, parse_overrides, read_toml
from fedllm.errors import ConfigError, FedllmError, RunError
from fedllm.resources import find_recipe
from fedllm.settings import PATHS, Scalar

console = Console(highlight=False)


class Engine(StrEnum):
    """What carries the messages."""

    simulation = "simulation"
    process = "process"


class Mode(StrEnum):
    """A recipe, or one of its baselines."""

    federated = "federated"
    base = "base"
    local = "local"
    central = "central"


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe that ships (fedllm ls), or a file.")],
    overrides: Overrides = None,
    engine: Annotated[
        Engine, typer.Option(help="simulation: Flower's engine, sites in parallel; process: one process.")
    ] = Engine.simulation,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="Short for federation.mode=...: the recipe as a federation, or a baseline: base (the "
            "untuned model is measured, nothing trained), local (each site alone), central (pooled records)."
        ),
    ] = None,
) -> None:
    """Run a recipe with simulated sites on this machine."""
    values, folder, config = _settings(find_recipe(recipe), [*(overrides or []), *_mode(mode)])
    from fedllm.data.sites import simulated_sites
    from fedllm.federation.plan import check_recipe
    from fedllm.models.load import load_config

    check_recipe(config)
    load_config(config.model)
    sites, seed, fold = config.federation.sites, config.run.seed, config.evaluation.fold
    for _ in simulated_sites(config.data, sites=sites, seed=seed, fold=fold):
        # each share is read and checked before anything starts
        pass
    console.print(f"run folder: {folder}", soft_wrap=True, markup=False)
    try:
        if engine is Engine.process:
            from fedllm.federation.inprocess import run_values

            try:
                run_values(values, sites=config.federation.sites)
            except FedllmError:
                _say_resume(folder, recipe)
                raise
        else:
            _simulate(values, folder, config)
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        _say_resume(folder, recipe)
        raise
    _print_result(folder)


def _mode(mode: Mode | None) -> list[str]:
    return [] if mode is None else [f"federation.mode={mode}"]


def _settings(recipe: Path, overrides: list[str]) -> tuple[dict[str, Scalar], Path, Config]:
    """Return what is sent to the server, the run folder, and the run's settings."""
    from fedllm.federation.run import require_unfinished
    from fedllm.runs.folder import load_config, new_run_path, open_run

    given = parse_overrides(overrides)
    config = Config.from_flat(read_toml(recipe) | given)
    if config.run.resume:
        others = sorted(set(given) - {"run.resume"})
        if others:
            raise ConfigError(
                f"run.resume goes on with the settings of its folder; remove {', '.join(others)}."
            )
        folder = open_run(Path(config.run.resume).expanduser().resolve())
        require_unfinished(folder)
        return {"run.resume": str(folder.path)}, folder.path, load_config(folder)
    path = Path(config.run.dir).expanduser().resolve() if config.run.dir else new_run_path()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path} exists; choose another run.dir, or go on with run.resume={path}")
    flat = config.to_flat() | {"run.dir": str(path)}
    named = {key: Path(str(flat[key])).expanduser().resolve() for key in PATHS if flat[key]}
    config = Config.from_flat(flat | {key: str(value) for key, value in named.items()})
    return config.changed(), path, config


def _simulate(values: dict[str, Scalar], folder: Path, config: Config) -> None:
    from fedllm.cli.launch import launched
    from fedllm.models.registry import EMBEDDED

    cores = os.cpu_count() or 1
    parallel = min(config.federation.parallel or cores, config.federation.sites)
    offline = config.data.source != "hub" and (bool(config.model.path) or config.model.name in EMBEDDED)
    watch = Watch()
    with launched(
        values, folder, sites=config.federation.sites, parallel=parallel, offline=offline
    ) as launch:
        watch.follow(folder, launch.running)
        if watch.failure:
            raise RunError(watch.failure)
        if not watch.finished and not launch.finished_well():
            raise RunError(f"the run did not start or ended early. Flower's log ends:\n{launch.log_tail()}")


class Watch:
    """Shows a run's events as they come: a live table on a terminal, else a line a round."""

    def __init__(self) -> None:
        self.rounds = LiveRounds()
        self.failure = ""
        self.finished = False
        self._began = time.time()

    def follow(self, folder: Path, running: Callable[[], bool]) -> None:
        """Show events until the run ends or nothing runs any more."""
        from fedllm.runs.events import follow_events

        with Live(console=console, refresh_per_second=2) if console.is_terminal else nullcontext() as live:
            for event in follow_events(folder, lambda: self.finished or not running()):
                # of a resumed run's past only its settings count here
                past = datetime.fromisoformat(event["time"]).timestamp() < self._began - 1
                if past and event["event"] != "run_started":
                    continue
                row = self._take(event)
                if live is not None:
                    live.update(self.rounds.render())
                elif event["event"] == "run_started":
                    console.print("  ".join(self.rounds.headings))
                elif row is not None:
                    console.print("  ".join(row))

    def _take(self, event: Event) -> list[str] | None:
        name = event["event"]
        if name == "warning":
            console.print(f"warning: {event['text']}", style="yellow", markup=False)
        if name == "site_reply" and not event["accepted"]:
            text = f"round {event['round']}: {event['site']} was set aside: {event['reason']}"
            console.print(text, style="yellow", markup=False)
        if name == "run_failed":
            self.failure = event["reason"]
        self.finished = self.finished or name in {"run_failed", "run_finished"}
        return self.rounds.add(event)


def _say_resume(folder: Path, recipe: str) -> None:
    from fedllm.runs.events import read_events
    from fedllm.runs.folder import RunFolder

    names = {event["event"] for event in read_events(RunFolder(folder))}
    if "run_started" not in names:
        console.print("the run had not begun; nothing was kept")
    elif "run_finished" not in names:
        console.print(f"go on with: fedllm run {recipe} run.resume={folder}", soft_wrap=True, markup=False)


def _print_result(folder: Path) -> None:
    from fedllm.runs.events import read_events
    from fedllm.runs.folder import open_run
    from fedllm.runs.metrics import write_metrics
    from fedllm.runs.report import write_report
    from fedllm.runs.traffic import write_traffic

    run = open_run(folder)
    # the server's processes may have been stopped while they wrote their pages
    write_metrics(run)
    write_traffic(run)
    write_report(run)
    console.print()
    console.print(final_table([(folder.name, read_events(run))]))
    console.print(
        f"\nrun folder: {folder}\nreport:     {folder / 'report.html'}", soft_wrap=True, markup=False
    )


Folder = Annotated[Path, typer.Argument(help="A run folder.")]
Site = Annotated[str, typer.Option(help="The simulated site whose personal adapter is meant (fedsa, local).")]


def show(runs: Annotated[list[Path], typer.Argument(help="Run folders, side by side.")]) -> None:
    """Print the final table of one or several runs."""
    from fedllm.runs.events import read_events
    from fedllm.runs.folder import open_run

    found = [(path.resolve().name, read_events(open_run(path))) for path in runs]
    console.print(final_table(found))


def report(run: Folder) -> None:
    """Write a run's metrics.csv and report.html anew from its events."""
    from fedllm.runs.folder import open_run
    from fedllm.runs.metrics import write_metrics
    from fedllm.runs.report import write_report
    from fedllm.runs.traffic import write_traffic

    folder = open_run(run)
    write_metrics(folder)
    write_traffic(folder)
    print(write_report(folder))


def export(
    run: Folder,
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    site: Site = "",
    merged: Annotated[
        bool, typer.Option("--merged", help="Write the whole model, the adapter merged into it.")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write the merged model as one GGUF file (Llama architecture).")
    ] = False,
    quantization: Annotated[
        str, typer.Option(help="With --gguf, how matrices are stored: f32, f16 (default) or q8_0.")
    ] = "",
    push: Annotated[
        str,
        typer.Option(metavar="OWNER/NAME", help="Then upload what was written to this hub repository."),
    ] = "",
) -> None:
    """Write a run's adapter as PeftModel.from_pretrained loads it, or the merged model, with a model card."""
    from huggingface_hub import HfApi

    from fedllm.federation.generate import export_adapter, export_gguf, export_merged
    from fedllm.runs.push import push_folder, require_repository

    if merged and gguf:
        raise ConfigError("--merged, --gguf: give one of them.")
    if quantization and not gguf:
        raise ConfigError("--quantization: only --gguf stores matrices in another way.")
    api = HfApi()
    if push:
        require_repository(api, push)
    if gguf:
        print(export_gguf(run, target, quantization=quantization or "f16", site=site))
    else:
        print((export_merged if merged else export_adapter)(run, target, site=site))
    if push:
        print(push_folder(api, target, push))


def generate(
    run: Folder,
    prompt: Annotated[str, typer.Argument(help="What to ask; the recipe's instruction goes before it.")],
    pair: Annotated[str, typer.Option(help="The second text, where the recipe reads two.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Longest answer, in tokens (0: as long as the recipe's).")
    ] = 0,
    site: Site = "",
) -> None:
    """Ask the tuned model and the untuned base the same thing."""
    from fedllm.federation.generate import answer

    base, tuned = answer(run, prompt, pair=pair, max_new_tokens=max_new_tokens, site=site)
    console.print("base:  ", base, markup=False)
    console.print("tuned: ", tuned, markup=False)


def classify(
    run: Folder,
    text: Annotated[str, typer.Argument(help="What to classify; the recipe's instruction goes before it.")],
    pair: Annotated[str, typer.Option(help="The second text, where the recipe reads two.")] = "",
    most: Annotated[int, typer.Option(min=1, help="Labels to show.")] = 5,
    site: Site = "",
) -> None:
    """Show the likeliest labels of a text, tuned and untuned."""
    from fedllm.federation.classify import classify as probabilities

    found = probabilities(run, text, pair=pair, site=site)
    table = Table(box=None, pad_edge=False)
    for column in ("label", "untuned base %", "tuned %"):
        table.add_column(column, justify="left" if column == "label" else "right")
    for row in found[:most]:
        before = "-" if row.base is None else f"{100 * row.base:.1f}"
        table.add_row(escape(row.label), before, f"{100 * row.tuned:.1f}")
    console.print(table)
    if len(found) > most:
        console.print(f"{len(found) - most} more labels; see --most", markup=False)
