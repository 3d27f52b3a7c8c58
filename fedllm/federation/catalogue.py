"""What there is to choose from, with what each part declares: for the command line and the docs."""

from __future__ import annotations

from inspect import getdoc
from pathlib import Path

from fedllm.adapters import METHODS
from fedllm.aggregation import OPTIMIZERS, RULES
from fedllm.wire import CODECS

#: Title, columns, rows.
Row = tuple[str, ...]
Section = tuple[str, Row, list[Row]]
_EXPORTS = {
    "lora": "an ordinary PEFT LoRA",
    "peft": "a PEFT adapter of its kind",
    "base": "a PEFT LoRA, with the base at hand (fedllm export)",
}
_NEEDS = "fed-sb, ravan, ffa, rolora, fedsa: where coordinates mean the same at every site"


def catalogue() -> list[Section]:
    """Return adapters, aggregation rules, server optimisers and codecs as tables."""
    return [_adapters(), *_rules(), _optimizers(), _codecs()]


def markdown() -> str:
    """Return the catalogue as the tables of docs/methods.md."""
    parts = []
    for title, columns, rows in catalogue():
        lines = [f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _adapters() -> Section:
    columns = ("name", "title", "trains", "exports", "private", "paper")
    rows: list[Row] = [
        (m.name, m.title, m.trains, _EXPORTS[m.export], _yes(m.private), m.paper) for m in METHODS.values()
    ]
    return "Adapters (adapter.method)", columns, rows


def _rules() -> list[Section]:
    """Return what rules send and whether they are exact, and what they promise otherwise."""
    every = [rule.about for rule in RULES.values()]
    sent: list[Row] = [
        (about.name, about.title, ", ".join(about.adapters) or "any", about.exact, about.up, about.down)
        for about in every
    ]
    promised: list[Row] = [
        (
            about.name,
            _yes(about.noise_linear),
            _yes(about.secure),
            _yes(about.gauge_free),
            _yes(about.unequal_ranks),
            about.paper,
        )
        for about in every
    ]
    return [
        (
            "Aggregation rules (strategy.name): numbers a site sends and gets each round for an m x n matrix",
            ("name", "title", "adapters", "exact", "up", "down"),
            sent,
        ),
        (
            "Aggregation rules: what else holds",
            ("name", "noise linear", "sums suffice", "gauge-free", "unequal ranks", "paper"),
            promised,
        ),
    ]


def _optimizers() -> Section:
    rows: list[Row] = [
        (name, (getdoc(kind) or "").partition("\n\n")[0].replace("\n", " "))
        for name, kind in OPTIMIZERS.items()
    ]
    title = f"Server optimisers (strategy.server_optimizer; with {_NEEDS})"
    return title, ("name", "what it does"), rows


def _codecs() -> Section:
    rows: list[Row] = [
        (codec.name, codec.description, codec.bits, _yes(codec.lossy), codec.purpose)
        for codec in CODECS.values()
    ]
    columns = ("name", "what it is", "bits a number", "lossy", "use")
    return "Codecs (wire.codec, wire.codec_down)", columns, rows


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def write_docs(page: Path) -> None:
    """Rewrite the generated part of a Markdown page."""
    begin, end = "<!-- catalogue: begin", "<!-- catalogue: end -->"
    text = page.read_text(encoding="utf-8")
    start = text.index("\n", text.index(begin)) + 1
    page.write_text(text[:start] + "\n" + markdown() + "\n" + text[text.index(end) :], encoding="utf-8")


if __name__ == "__main__":
    write_docs(Path(__file__).parents[2] / "docs" / "methods.md")
