"""Commands about base models: ls, pull."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(help="Base models that need no model hub.", no_args_is_help=True)


@app.command("ls")
def list_models() -> None:
    """List the embedded models and whether they are on this machine."""
    from fedllm.home import home
    from fedllm.models.pull import is_complete
    from fedllm.models.registry import EMBEDDED

    table = Table(box=None, pad_edge=False)
    for column in ("model", "here", "parameters", "licence", "what it is"):
        table.add_column(column, no_wrap=column == "model")
    for name, model in EMBEDDED.items():
        here = "yes" if is_complete(home() / "models" / name) else "no"
        table.add_row(name, here, f"{model.parameters:,}", model.licence, model.description)
    Console().print(table)


@app.command("pull")
def pull_model(name: Annotated[str, typer.Argument(help="An embedded model's name.")]) -> None:
    """Fetch an embedded model, check its hash and convert it once."""
    from fedllm.models.pull import pull

    columns = (TextColumn("{task.description:>12}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, int] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total or None)
            progress.update(tasks[stage], completed=done, total=total or None)  # type: ignore[arg-type]

        path = pull(name, progress=show)
    print(path)
