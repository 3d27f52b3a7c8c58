"""The command that scores a run's adapter on public question sets: FlowerTune's, or lm-eval's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedllm.errors import ConfigError

console = Console(highlight=False)


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    task: Annotated[
        list[str],
        typer.Option(
            help="fpb, fiqa, tfns, pubmedqa, medmcqa, medqa or careqa; finance or medical for all of "
            "them (repeatable); or lm-eval:NAME,NAME for tasks of the Language Model Evaluation Harness."
        ),
    ],
    mode: Annotated[
        str, typer.Option(help="leaderboard: as FlowerTune's public code scores; fixed: its flaws mended.")
    ] = "leaderboard",
    file: Annotated[
        Path | None, typer.Option(help="Rows of one task in place of the hub's: csv, jsonl or parquet.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Ask only so many questions a task; 0: all.")] = 0,
    site: Annotated[
        str, typer.Option(help="The simulated site whose personal adapter is meant (fedsa, local).")
    ] = "",
    untuned: Annotated[bool, typer.Option("--untuned", help="Score the base without the adapter.")] = False,
) -> None:
    """Score a run's model on the question sets of FlowerTune's leaderboards, or on tasks of lm-eval."""
    if any(name.startswith("lm-eval:") for name in task):
        if file is not None or untuned or mode != "leaderboard":
            raise ConfigError(
                "--file, --untuned and --mode are for FlowerTune's sets: lm-eval takes a task file "
                "(--task lm-eval:FILE.yaml), and base and tuned model are always scored side by side."
            )
        _with_harness(run, task, limit=limit, site=site)
        return
    from fedllm.federation.flowertune import TRAFFIC_LIMIT, evaluate_run

    found = evaluate_run(run, task, mode=mode, file=file, limit=limit, site=site, untuned=untuned)
    table = Table(box=None, pad_edge=False)
    table.add_column("task")
    for column in ("questions", "accuracy %", "no label found %"):
        table.add_column(column, justify="right")
    for result in found.results:
        unread = f"{100 * result.unread:.1f}"
        table.add_row(result.task, str(result.records), f"{100 * result.accuracy:.2f}", unread)
    if len(found.results) > 1:
        table.add_row("mean", "", f"{100 * found.mean:.2f}", "")
    console.print(table)
    console.print(f"\ntraffic: {found.traffic_mib:,.2f} MiB of {TRAFFIC_LIMIT:,} that the leaderboard allows")
    if found.traffic_mib > TRAFFIC_LIMIT:
        console.print("above the limit: this run would not be ranked", style="yellow")
    if mode == "leaderboard" and not all(result.complete for result in found.results):
        console.print("no leaderboard figure: --file or --limit changes which questions are asked")


def _with_harness(run: Path, words: list[str], *, limit: int, site: str) -> None:
    from fedllm.federation.harness import evaluate_with_harness, harness_tasks

    found = evaluate_with_harness(run, harness_tasks(words), limit=limit, site=site)
    table = Table(box=None, pad_edge=False)
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("base", "tuned", "standard error"):
        table.add_column(column, justify="right")
    for one in found.measures:
        numbers = ("-" if value is None else f"{value:.4f}" for value in (one.base, one.tuned, one.error))
        table.add_row(one.task, one.metric, *numbers)
    console.print(table)
    if limit:
        console.print(f"\nonly the first {limit} questions of each task: no figures to compare with others'")
    console.print(f"kept in {found.file}", soft_wrap=True, markup=False)
