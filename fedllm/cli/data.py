"""Commands about data files: check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedllm.cli.recipes import Overrides
from fedllm.config import Config, parse_overrides

app = typer.Typer(help="A site's own data files.", no_args_is_help=True)


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="A csv, jsonl or parquet file.")],
    overrides: Overrides = None,
) -> None:
    """Count rows, labels, options or pairs of answers, duplicates, sites, units and truncated records.

    No text is shown, labels aside. With rejected=COLUMN the file is read as pairs of answers, with
    options=COLUMN as multiple choice.
    """
    from fedllm.data.check import check_file

    words = overrides or []
    values = parse_overrides(word if "." in word.partition("=")[0] else f"data.{word}" for word in words)
    if "data.rejected" in values:
        values = {**parse_overrides(["train.objective=dpo", "data.task=generate"]), **values}
    if "data.options" in values:
        values = {**parse_overrides(["data.task=choose"]), **values}
    config = Config.from_flat(values | {"data.source": "file", "data.path": str(file)})
    tokenizer = None
    if "model.name" in values or "model.path" in values:
        from fedllm.models.load import load_tokenizer

        tokenizer = load_tokenizer(config.model)
    found = check_file(
        file, config.data, tokenizer, config.train.max_length, encodes=config.model.kind == "encoder"
    )
    facts = Table(box=None, show_header=False, title=escape(str(file)))
    facts.add_row("rows", f"{found.rows:,}")
    facts.add_row("columns", escape(", ".join(found.columns)))
    facts.add_row("duplicates", f"{found.duplicates:,}")
    if config.data.task == "classify":
        facts.add_row("same text, other label", f"{found.conflicting:,}")
    if found.choices is not None:
        facts.add_row("options a record", f"{found.choices.fewest} to {found.choices.most}")
        facts.add_row("same text and options, other answer", f"{found.conflicting:,}")
        facts.add_row("two equal options", f"{found.choices.repeated:,}")
        facts.add_row("cannot be asked", f"{sum(count for count, _ in found.choices.faults.values()):,}")
    if found.preferences is not None:
        facts.add_row("different prompts", f"{found.preferences.prompts:,}")
        facts.add_row("two equal answers", f"{found.preferences.ties:,}")
        facts.add_row("preferred both ways round", f"{found.preferences.contradictory:,}")
        facts.add_row("preferred answer is the longer one", f"{found.preferences.longer:.1%}")
    facts.add_row("rows with an empty cell", f"{found.empty:,}")
    share = "give model.name to measure" if found.truncated is None else f"{found.truncated:.1%}"
    facts.add_row(f"longer than train.max_length={config.train.max_length}", share)
    if found.sites is not None:
        sites = ", ".join(f"{name} {count:,}" for name, count in found.sites.items())
        facts.add_row("sites", escape(sites))
    if found.units is not None:
        facts.add_row("units", f"{found.units[0]:,}, at most {found.units[1]:,} records each")
    console = Console()
    console.print(facts)
    labels = Table("label" if found.choices is None else "right option", "records", box=None)
    shown = sorted(found.labels.items(), key=lambda item: -item[1])
    for label, count in shown[:30]:
        labels.add_row(escape(label), f"{count:,}")
    if len(shown) > 30:
        labels.add_row(f"and {len(shown) - 30} more", "")
    if shown:
        console.print(labels)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
