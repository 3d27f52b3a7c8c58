"""Which pictures a run's report shows, each with its keys and its words for screen readers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedllm.config import Config
from fedllm.runs.audits import Audit
from fedllm.runs.measures import METRICS, Metric, judged_by
from fedllm.runs.metrics import RoundMetrics, Row, metrics_withheld
from fedllm.runs.plots import bounds_plot, bytes_plot, epsilon_plot, metric_plot
from fedllm.runs.wording import size


@dataclass(frozen=True)
class Plot:
    """One figure: an SVG with its keys."""

    title: str
    svg: Markup
    keys: tuple[tuple[str, str], ...] = ()


def round_charts(config: Config, metrics: Sequence[RoundMetrics]) -> list[Plot]:
    """Return loss and what judges the run (if measured), epsilon (where private), bytes over the rounds."""
    if not metrics:
        return []
    rounds = [entry.round for entry in metrics]
    plots = [
        _metric_chart(metric, metrics, name)
        for name, metric in _curves(config).items()
        if _measured(metrics, name)
    ]
    if config.privacy.enabled:
        plots.append(_epsilon_chart(config, metrics))
    title = "Bytes, all sites together"
    up = [entry.federation.bytes_up for entry in metrics]
    down = [entry.federation.bytes_down for entry in metrics]
    alt = f"{title}, each round; in all {size(sum(up))} from the sites and {size(sum(down))} to them."
    svg = bytes_plot(title, rounds=rounds, up=up, down=down, alt=alt)
    plots.append(Plot(title, Markup(svg), keys=(("", "up (from sites)"), ("second", "down (to sites)"))))
    return plots


def rounds_note(config: Config, metrics: Sequence[RoundMetrics]) -> str:
    """Return which curves are missing among a run's charts and why; empty where none is."""
    missing = [m.title for name, m in _curves(config).items() if not _measured(metrics, name)]
    if not metrics or not missing:
        return ""
    why = (
        "Withheld: the sites keep these values" if metrics_withheld(config) else "Not measured round by round"
    )
    return f"{why} ({' and '.join(missing)})."


def audit_chart(audits: Sequence[Audit]) -> Plot | None:
    """Return what audits prove beside what the accountant says, or None without such an audit."""
    bounds = [bound for audit in audits for bound in audit.bounds]
    if not bounds:
        return None
    said = "; ".join(f"{name}: accountant {top:.2f}, audit {low:.2f}" for name, top, low in bounds)
    title = "Epsilon by accountant and by audit"
    svg = bounds_plot(title, bounds, alt=f"{title}. {said}.")
    keys = (("", "by the accountant"), ("second", "proven by the audit at 95 %: it may not be longer"))
    return Plot("Epsilon", Markup(svg), keys=keys)


def _curves(config: Config) -> dict[str, Metric]:
    """Return the metrics that are drawn over the rounds: loss, and the one that judges the run."""
    name, metric = next(iter(judged_by(config).items()))
    return {"loss": METRICS["loss"], name: metric}


def _measured(metrics: Sequence[RoundMetrics], name: str) -> bool:
    return any(vars(entry.federation)[name] is not None for entry in metrics)


def _metric_chart(metric: Metric, metrics: Sequence[RoundMetrics], name: str) -> Plot:
    def used(row: Row) -> float | None:
        return vars(row)[name] if row.accepted else None

    title = f"Held-out {metric.title}"
    means = [used(entry.federation) for entry in metrics]
    known = [value for value in means if value is not None]
    sites = _series(metrics, used)
    first, end = metric.text(known[0]), metric.text(known[-1])
    alt = f"{title} a round, {len(sites)} sites and their mean; the mean goes from {first} to {end}."
    rounds = [entry.round for entry in metrics]
    svg = metric_plot(title, rounds=rounds, sites=sites, mean=means, share=metric.unit == "%", alt=alt)
    return Plot(title, Markup(svg), keys=(("", "mean"), ("site", "a site")))


def _epsilon_chart(config: Config, metrics: Sequence[RoundMetrics]) -> Plot:
    title, budget = "Epsilon spent", config.privacy.epsilon or None
    spent = _series(metrics, lambda row: row.epsilon)
    largest = max((value for line in spent.values() for value in line if value is not None), default=0.0)
    limit = f"budget {budget:g}" if budget else ""
    alt = (
        f"{title} by each site after each round; the largest is {largest:.2f}{', ' + limit if limit else ''}."
    )
    keys = [("site", "spent by a site")] + ([("dashed", limit)] if limit else [])
    rounds = [entry.round for entry in metrics]
    svg = epsilon_plot(title, rounds=rounds, sites=spent, budget=budget, alt=alt)
    return Plot(title, Markup(svg), keys=tuple(keys))


def _series(
    metrics: Sequence[RoundMetrics], pick: Callable[[Row], float | None]
) -> dict[str, list[float | None]]:
    """Return site -> one value a round, None where there is none; sites without any are left out."""
    rows = [{row.site: row for row in entry.sites} for entry in metrics]
    names = dict.fromkeys(name for entry in rows for name in entry)
    series = {name: [pick(entry[name]) if name in entry else None for entry in rows] for name in names}
    return {name: values for name, values in series.items() if any(v is not None for v in values)}
