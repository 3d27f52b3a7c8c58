"""The command that chooses among settings privately."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedllm.cli.comparison import read_comparison
from fedllm.cli.jobs import Job, plan, run_all
from fedllm.config import Config
from fedllm.errors import RunError

if TYPE_CHECKING:
    from fedllm.federation.tuning import TuningCost

console = Console(highlight=False)


def tune(
    file: Annotated[Path, typer.Argument(help="Candidates: a comparison file, its cells the candidates.")],
    dir: Annotated[Path | None, typer.Option(help="Folder of runs; default: runs/NAME-tuned, here.")] = None,
    mean: Annotated[float, typer.Option(min=1.5, help="Expected number of runs.")] = 3.0,
) -> None:
    """Choose among private candidates on public held-out records, and account for the choice.

    The number of runs is random (geometric), each run takes a random candidate with fresh noise, and
    the best by mean held-out accuracy is kept. Only the kept adapter may be passed on, and the number
    of runs may not, for the smaller epsilon to hold; who saw all runs holds the composed one.
    """
    from fedllm.federation.tuning import draw_runs, require_tunable, tuning_cost

    comparison = replace(read_comparison(file), baselines=())
    folder = (dir or Path("runs") / f"{file.stem}-tuned").expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: exists; a private choice starts anew, in a new folder (--dir).")
    candidates = [job for job in plan(comparison, file, folder) if "federation.mode" not in job.changes]
    candidates = [job for job in candidates if job.seed == comparison.seeds[0]]
    require_tunable([job.config for job in candidates])
    drawn = draw_runs(candidates=len(candidates), mean=mean)
    jobs = [_placed(candidates[choice], folder / str(number)) for number, choice in enumerate(drawn, start=1)]
    failures = run_all(jobs, {job.name: "missing" for job in jobs})
    scored = [(_score(job), job) for job in jobs if job.name not in failures]
    if not scored:
        raise RunError(f"no run finished: {'; '.join(failures.values())}")
    _, best = max(scored, key=lambda found: found[0])
    _say(scored, best, tuning_cost(best.config, mean=mean, runs=len(jobs)), mean=mean)
    for name, reason in failures.items():
        console.print(f"failed: {name}: {reason}", style="red", soft_wrap=True, markup=False)
    if failures:
        raise typer.Exit(1)


def _placed(job: Job, folder: Path) -> Job:
    """Return a candidate's job with a folder of its own for this run."""
    return replace(
        job,
        group=f"run {folder.name}",
        folder=folder,
        changes={**job.changes, "run.dir": str(folder)},
        config=Config.from_flat(job.config.to_flat() | {"run.dir": str(folder)}),
    )


def _score(job: Job) -> float:
    """Return the mean held-out accuracy over the sites."""
    from fedllm.runs.events import read_events
    from fedllm.runs.folder import open_run
    from fedllm.runs.metrics import mean
    from fedllm.runs.sites import site_summaries

    summaries = site_summaries(read_events(open_run(job.folder)))
    found = mean(summary.final["accuracy"] for summary in summaries)
    if found is None:
        raise RunError(f"{job.folder}: no site told its accuracy, so this run cannot be compared.")
    return found


def _say(scored: list[tuple[float, Job]], best: Job, costs: list[TuningCost], *, mean: float) -> None:
    table = Table(
        "run", "candidate", "held-out accuracy, %", "", box=None, title="runs", title_justify="left"
    )
    for score, job in scored:
        table.add_row(job.group, escape(job.cell), f"{100 * score:.1f}", "kept" if job is best else "")
    console.print(table)
    spent = Table(
        "site",
        "one run",
        "the kept adapter alone",
        "all runs seen",
        box=None,
        title=f"epsilon at delta {best.config.privacy.delta:g}",
        title_justify="left",
    )
    for cost in costs:
        spent.add_row(escape(cost.site), f"{cost.one:.2f}", f"{cost.selected:.2f}", f"{cost.composed:.2f}")
    spent.caption = (
        f"kept adapter alone: RDP, random number of runs with mean {mean:g}; all runs seen: PLD, for "
        "coordinator and sites"
    )
    spent.caption_justify = "left"
    console.print(spent)
    console.print(f"kept: {best.folder / 'adapter'}", soft_wrap=True, markup=False)
