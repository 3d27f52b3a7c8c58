"""The report of a run: one self-contained page, written from the run folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fedllm.config import Config
from fedllm.runs.audits import KINDS, Audit, read_audits
from fedllm.runs.calibration import calibration_rows, reliability_chart
from fedllm.runs.charts import audit_chart, round_charts, rounds_note
from fedllm.runs.events import Event, read_events
from fedllm.runs.folder import RunFolder, atomic_write, load_config
from fedllm.runs.limits import Limit, site_limits
from fedllm.runs.manifest import read_manifest
from fedllm.runs.measures import UNTUNED_BASE, base_name, judged_by
from fedllm.runs.metrics import WITHHELD, RoundMetrics, as_told, metrics_withheld, round_metrics
from fedllm.runs.privacy_text import privacy_statement
from fedllm.runs.sites import SiteSummary, site_summaries, spread, total
from fedllm.runs.style import STYLE
from fedllm.runs.summary import last, status_of, summarise
from fedllm.runs.template import TEMPLATE
from fedllm.runs.traffic import STAGES, flowertune_mib, totals, traffic
from fedllm.runs.whole_sites import whole_sites_spent
from fedllm.runs.wording import moment, size
from fedllm.settings import PATHS

UNKNOWN = "n/a"


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` anew; works at any time of a run.

    Raises
    ------
    RunError
        If settings, events or manifest cannot be read, or the page cannot be written.
    """
    events = read_events(folder)
    page = render_report(
        name=folder.path.name,
        config=load_config(folder),
        events=events,
        manifest=read_manifest(folder),
        audits=read_audits(folder),
        limits=site_limits(folder, [site.name for site in site_summaries(events) if site.name]),
    )
    atomic_write(folder.report_file, page.encode("utf-8", "replace"))
    return folder.report_file


def render_report(
    *,
    name: str,
    config: Config,
    events: Sequence[Event],
    manifest: Mapping[str, Any] | None,
    audits: Sequence[Audit] = (),
    limits: Mapping[str, Limit] | None = None,
) -> str:
    """Return the page for a run.

    Parameters
    ----------
    name : str
        What the run is called when its events do not say.
    config : Config
        The settings of the run.
    events : Sequence[Event]
        Its events, oldest first.
    manifest : Mapping or None
        Its manifest, if written.
    audits : Sequence[Audit]
        What audits found about it.
    limits : Mapping[str, Limit], optional
        What simulated sites' own policies allow.
    """
    started = last(events, "run_started")
    joined = last(events, "site_joined")
    rounds, sites = round_metrics(events), site_summaries(events)
    config = as_told(config, events)
    withheld = metrics_withheld(config)
    absent = WITHHELD if withheld else UNKNOWN
    kinds = _kinds(config, sites)
    untrained = config.federation.mode == "base"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        style=STYLE,
        title=f"fedllm run {started['run_id'] if started else name}",
        time=moment(started["time"]) if started else "",
        status=status_of(events),
        summary=summarise(config, events, sites),
        tiles=_tiles(config, events, rounds=rounds, sites=sites, absent=absent),
        plots=round_charts(config, rounds),
        rounds_note=rounds_note(config, rounds),
        no_rounds="None: this is a baseline." if untrained else "No reply has arrived yet.",
        columns=_columns(config, kinds),
        sites=[{"name": site.name, "cells": _cells(site, config, kinds, absent)} for site in sites],
        feet=[
            {"name": "All sites", "cells": _cells(total(sites), config, kinds, absent)},
            *_ends(sites, config, kinds),
        ],
        calibration=calibration_rows(config, sites),
        base_head=_base_head(config),
        reliability=reliability_chart(config, events),
        absent=(WITHHELD, UNKNOWN),
        private=config.privacy.enabled,
        sites_note=_sites_note(config, kinds, withheld=withheld),
        traffic=_traffic_rows(events),
        flowertune=f"{flowertune_mib(traffic(events)):,.2f}",
        failures=[
            (moment(event["time"]), event["reason"]) for event in events if event["event"] == "run_failed"
        ],
        set_aside=[e for e in events if e["event"] == "site_reply" and not e["accepted"]],
        warnings=[event["text"] for event in events if event["event"] == "warning"],
        privacy=privacy_statement(
            config,
            epsilons={site.name: site.epsilon for site in sites},
            simulated=None if joined is None else bool(joined["simulated"]),
            whole_sites=whole_sites_spent(events),
            heldout=total(sites).heldout_epsilon,
            limits=limits,
        ),
        changed=_changed(config),
        manifest=_manifest_rows(manifest) if manifest is not None else [],
        audits=audits,
        audit_kinds=KINDS,
        audit_plot=audit_chart(audits),
    )


def _tiles(
    config: Config,
    events: Sequence[Event],
    *,
    rounds: Sequence[RoundMetrics],
    sites: Sequence[SiteSummary],
    absent: str,
) -> list[tuple[str, str]]:
    mean = total(sites)
    sums = totals(traffic(events))
    finished = sum(metrics.federation.seconds is not None for metrics in rounds)
    name, metric = next(iter(judged_by(config).items()))
    trained = config.federation.mode != "base"
    what, value = ("tuned", mean.final[name]) if trained else ("untuned base", mean.base[name])
    tiles = [
        ("Rounds", f"{finished} of {config.federation.rounds}" if trained else "none"),
        ("Sites", str(len(sites) or config.federation.sites)),
        (f"Mean {metric.title}, {what}", absent if value is None else metric.text(value)),
    ]
    if config.privacy.enabled and trained:
        tiles.append(("Largest epsilon", _epsilon(mean.epsilon, config)))
    tiles.append(("Left the sites", size(sum(up for up, _ in sums.values()))))
    return tiles


def _columns(config: Config, kinds: Mapping[str, Sequence[str]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return each metric's head and what is shown of it."""
    heads = {"base": _base_head(config)}
    return [
        (f"{metric.title[0].upper()}{metric.title[1:]}", tuple(heads.get(kind, kind) for kind in kinds[name]))
        for name, metric in judged_by(config).items()
    ]


def _base_head(config: Config) -> str:
    return "base" if base_name(config) == UNTUNED_BASE else base_name(config)


def _cells(site: SiteSummary, config: Config, kinds: Mapping[str, Sequence[str]], absent: str) -> list[str]:
    cells: list[str] = []
    for place, (name, metric) in enumerate(judged_by(config).items()):
        values = {kind: vars(site)[kind][name] for kind in kinds[name]}
        texts = {kind: absent if value is None else metric.text(value) for kind, value in values.items()}
        if place == 0 and site.interval is not None:
            texts["final"] += " ({:.0f} to {:.0f})".format(*(metric.scale * end for end in site.interval))
        cells += texts.values()
    return [
        *cells,
        absent if site.records is None else f"{site.records:,}",
        *([_epsilon(site.epsilon, config)] if config.privacy.enabled else []),
        size(site.bytes_up),
        size(site.bytes_down),
        f"{site.answered} of {site.asked}",
    ]


def _ends(
    sites: Sequence[SiteSummary], config: Config, kinds: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Return the rows of the worst site and of the gap, with :func:`_cells`' columns; none for one site."""
    worst, gap = [], []
    for name, metric in judged_by(config).items():
        for kind in kinds[name]:
            known = {site.name: vars(site)[kind][name] for site in sites}
            found = spread(known, best=metric.best)
            worst.append("" if found is None else metric.text(found.worst))
            gap.append("" if found is None else metric.number(found.gap))
    if not any(worst):
        return []
    rest = [""] * (len(_cells(total(sites), config, kinds, "")) - len(worst))
    return [{"name": "Worst site", "cells": worst + rest}, {"name": "Gap", "cells": gap + rest}]


def _kinds(config: Config, sites: Sequence[SiteSummary]) -> dict[str, tuple[str, ...]]:
    """Return what is shown of each metric, the first one most: fields of :class:`SiteSummary`."""
    kinds = (*(("majority",) if config.data.labelled else ()), "base", "final")
    first, *rest = judged_by(config)
    alone = any(site.elsewhere[first] is not None for site in sites)
    return {first: (*kinds, "elsewhere") if alone else kinds, **dict.fromkeys(rest, kinds)}


def _traffic_rows(events: Sequence[Event]) -> list[tuple[str, str, str]]:
    """Return what it was, bytes from the sites, bytes to the sites, and their sums."""
    sums = totals(traffic(events))
    rows = [(STAGES.get(stage, stage), up, down) for stage, (up, down) in sums.items()]
    if rows:
        rows.append(("in all", sum(up for _, up, _ in rows), sum(down for _, _, down in rows)))
    return [(name, f"{up:,}", f"{down:,}") for name, up, down in rows]


def _sites_note(config: Config, kinds: Mapping[str, Sequence[str]], *, withheld: bool) -> str:
    base = (
        "Base: the untuned model"
        if base_name(config) == UNTUNED_BASE
        else "Untrained head: the base under the random head that training starts from"
    )
    name, metric = next(iter(judged_by(config).items()))
    brackets = (
        "" if name == "loss" else f"; in brackets a 95 % interval of {metric.title} by resampling records"
    )
    text = (
        f"{base}. Final: with the finished adapter{brackets}. "
        "Bytes: training messages as serialised, over all rounds. "
        "Worst site and gap: the least good value of a site, and how far the best is from it. "
        "All sites: means of metrics, sums of counts and bytes"
    )
    if "elsewhere" in kinds[name]:
        text = f"Elsewhere: a site's own adapter on pooled held-out records of the others. {text}"
    if config.data.labelled:
        kind = "letter" if config.data.task == "choose" else "label"
        text = f"Majority: always answering a site's most frequent {kind}. {text}"
    if not config.private_replies:
        return f"{text}."
    if config.privacy.enabled:
        text += f", largest epsilon. Epsilon is at delta {config.privacy.delta:g}"
    text += "."
    if withheld:
        return f"{text} Withheld: metrics on private held-out records stay at the site."
    if not config.data.heldout_public:
        return (
            f"{text} Records, accuracies and intervals come from counts over private held-out records, to "
            "which each site added noise."
        )
    return f"{text} Metrics are on held-out records that the recipe declares public."


def _changed(config: Config) -> list[tuple[str, str]]:
    """Return the changed settings as text, without paths of this machine."""
    return [(key, _plain(value)) for key, value in config.changed().items() if key not in PATHS]


def _manifest_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the manifest as one row a leaf."""
    rows: list[tuple[str, str]] = []
    for key, value in manifest.items():
        if isinstance(value, Mapping):
            rows += [(f"{key}: {name}", _plain(leaf) or WITHHELD) for name, leaf in value.items()]
        elif value != "":
            rows.append((key, _plain(value)))
    return rows


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _epsilon(value: float | None, config: Config) -> str:
    if value is None:
        return UNKNOWN
    budget = config.privacy.epsilon
    return f"{value:.2f} of {budget:g}" if budget else f"{value:.2f}"
