"""The command that lets a sceptic check a private run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedllm.cli.recipes import Overrides
from fedllm.config import Config
from fedllm.errors import ConfigError
from fedllm.resources import find_recipe

if TYPE_CHECKING:
    from fedllm.federation.audit import Check
    from fedllm.runs.folder import RunFolder

console = Console(highlight=False)
_COLOURS = {"pass": "green", "fail": "red", "measured": "cyan"}


@dataclass(frozen=True)
class Found:
    """What one kind of audit found."""

    checks: Sequence[Check]
    bounds: tuple[tuple[str, float, float], ...] = field(default=())


def audit(
    subject: Annotated[str, typer.Argument(help="A run folder, or a recipe.")],
    overrides: Overrides = None,
    static: Annotated[
        bool, typer.Option("--static", help="Compare the plan with what the code does (seconds).")
    ] = False,
    mechanism: Annotated[
        bool, typer.Option("--mechanism", help="A worst-case canary through the private step (seconds).")
    ] = False,
    run: Annotated[
        bool, typer.Option("--run", help="Train the recipe once with canaries at every site, or among them.")
    ] = False,
    mia: Annotated[
        bool, typer.Option("--mia", help="Membership inference on the run's finished adapter.")
    ] = False,
    inversion: Annotated[
        bool, typer.Option("--inversion", help="Read a record from one step's update, as a coordinator.")
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option(help="A real site's policy: --static and --mechanism with its own records and limits."),
    ] = None,
    trials: Annotated[int, typer.Option(min=100, help="Trials of --mechanism in each world.")] = 10_000,
    canaries: Annotated[int, typer.Option(min=10, help="Canaries of --run, a site; canary sites.")] = 1000,
    records: Annotated[int, typer.Option(min=1, help="Most records a site of --mia.")] = 500,
) -> None:
    """Check a private run or recipe: static and mechanism audits unless others are named."""
    folder, config = _subject(subject, overrides or [])
    chosen = {"static": static, "mechanism": mechanism, "run": run, "mia": mia, "inversion": inversion}
    if not any(chosen.values()):
        # the static audit looks at a site's private step
        chosen |= {"static": config.privacy.enabled or not config.site_privacy.enabled, "mechanism": True}
    beyond = [f"--{kind}" for kind in ("run", "mia", "inversion") if chosen[kind]]
    if policy is not None and beyond:
        raise ConfigError(f"--policy goes with --static and --mechanism, not with {', '.join(beyond)}.")
    from fedllm.federation.site import use_threads

    use_threads(config)
    auditors: dict[str, Callable[[], Found]] = {
        "static": lambda: _static(folder, config, policy),
        "mechanism": lambda: _mechanism(config, policy, trials),
        "run": lambda: _run(config, canaries),
        "mia": lambda: _mia(folder, records),
        "inversion": lambda: _inversion(config),
    }
    failed = [_one(kind, auditors[kind], folder) for kind, wanted in chosen.items() if wanted]
    if folder is not None:
        from fedllm.runs.report import write_report

        console.print(f"report: {write_report(folder)}", soft_wrap=True, markup=False)
    if any(failed):
        raise typer.Exit(1)


def _one(kind: str, auditor: Callable[[], Found], folder: RunFolder | None) -> bool:
    """Run one audit, show it, keep it in the run folder; return whether a line failed."""
    from fedllm.runs.audits import KINDS, Audit, save_audit

    console.print(f"\n[bold]{kind}[/bold]: {KINDS[kind]}")
    with console.status("working"):
        found = auditor()
    verdicts = {True: "pass", False: "fail", None: "measured"}
    lines = tuple((check.name, verdicts[check.passed], check.detail) for check in found.checks)
    for name, verdict, detail in lines:
        console.print(f"  [{_COLOURS[verdict]}]{verdict:<8}[/] {escape(name)}: {escape(detail)}")
    result = Audit(
        kind=kind,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        lines=lines,
        bounds=found.bounds,
    )
    if folder is not None:
        save_audit(folder, result)
    return result.failed


def _subject(name: str, overrides: list[str]) -> tuple[RunFolder | None, Config]:
    from fedllm.runs.folder import load_config, open_run

    if os.path.isdir(name):
        if overrides:
            raise ConfigError("settings cannot be changed for the audit of a run; name a recipe for that.")
        folder = open_run(name)
        return folder, load_config(folder)
    return None, Config.from_toml(find_recipe(name), overrides)


def _static(folder: RunFolder | None, config: Config, policy: Path | None) -> Found:
    from fedllm.federation.audit import run_checks, static_checks, subject

    checks = static_checks(subject(config, policy))
    return Found([*checks, *(run_checks(folder, config) if folder is not None else [])])


def _mechanism(config: Config, policy: Path | None, trials: int) -> Found:
    from fedllm.federation.audit import audit_mechanism, subject
    from fedllm.federation.site_canaries import audit_site_mechanism

    found = []
    if config.privacy.enabled or not config.site_privacy.enabled:
        found.append(audit_mechanism(subject(config, policy).plan, trials=trials))
    if config.site_privacy.enabled:
        found += audit_site_mechanism(config, trials=trials)
    return Found([one.check for one in found], tuple(bound for one in found for bound in one.bounds))


def _run(config: Config, canaries: int) -> Found:
    from fedllm.federation.canary_run import audit_one_run

    found = audit_one_run(config, canaries=canaries)
    return Found([one.check for one in found], tuple(bound for one in found for bound in one.bounds))


def _mia(folder: RunFolder | None, records: int) -> Found:
    from fedllm.federation.membership import attack_membership

    if folder is None:
        raise ConfigError("--mia needs a finished run's folder: it attacks the released adapter.")
    return Found([attack_membership(folder.path, records=records).check])


def _inversion(config: Config) -> Found:
    from fedllm.federation.inversion import attack_updates

    return Found(attack_updates(config).checks)
