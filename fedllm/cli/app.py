"""The ``fedllm`` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from fedllm.cli import audit, budget, compare, data, evaluate, models, recipes, runs, tune
from fedllm.cli import methods as catalogue
from fedllm.errors import FedllmError

app = typer.Typer(
    name="fedllm",
    help="Federated fine-tuning of language models: only small adapter matrices leave a site.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("run")(runs.run)
app.command("compare")(compare.compare)
app.command("check")(recipes.check)
app.command("ls")(recipes.list_recipes)
app.command("cp")(recipes.copy)
app.command("settings")(recipes.settings)
app.command("methods")(catalogue.methods)
app.command("bytes")(catalogue.compare_bytes)
app.command("tune")(tune.tune)
app.command("audit")(audit.audit)
app.command("show")(runs.show)
app.command("report")(runs.report)
app.command("generate")(runs.generate)
app.command("classify")(runs.classify)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(runs.export)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(budget.app, name="budget")


def _version(value: bool) -> None:
    if value:
        from fedllm import __version__

        print(f"fedllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; every error becomes one line and an exit code."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        app()
    except FedllmError as error:
        errors.print(f"error: {error}", style="red")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("FEDLLM_DEBUG"):
            raise
        errors.print(f"error: {type(error).__name__}: {error} (set FEDLLM_DEBUG=1 to see where)", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
