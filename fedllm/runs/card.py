"""The model card of every folder that is written, in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from fedllm.adapters import METHODS
from fedllm.config import Config
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder, atomic_write, load_config
from fedllm.runs.limits import site_limits
from fedllm.runs.manifest import read_manifest
from fedllm.runs.measures import Metric, base_name, judged_by
from fedllm.runs.metrics import as_told, metrics_withheld
from fedllm.runs.privacy_text import PrivacyStatement, privacy_statement
from fedllm.runs.sites import SiteSummary, site_summaries, total
from fedllm.runs.usage import Usage, use_section
from fedllm.runs.whole_sites import whole_sites_spent
from fedllm.runs.wording import count

_TASKS = {"classify": "classification", "choose": "multiple choice", "generate": "free text"}
#: What the answer that is always the same is called, where there is one.
_CONSTANT = {"classify": "majority class", "choose": "majority letter"}
TEMPLATE = """{{ front }}
# {{ title }}

{{ what }}

| | |
|---|---|
| method | {{ method }}, rank {{ config.adapter.rank }}, aggregated by `{{ config.strategy.name }}` |
| task | {{ task }} |
{% for name, value in wording %}
| {{ name }} | {{ value }} |
{% endfor %}
| training | {{ training }} |
{% if run %}
| settings | sha256 {{ run.manifest["config_sha256"] }} |
| made with | {% for name, value in run.manifest["versions"].items() %}{{ name }} {{ value }}\
{{ ", " if not loop.last }}{% endfor %} |
{% endif %}

## Use

{{ use }}

## Results

{% if not run %}
Results and privacy are told by the report of the run, which its coordinator keeps (`report.html`).
{% elif run.withheld %}
Held-out records are private; their metrics stayed at the sites.
{% elif not (run.sites | selectattr("records") | list) %}
No held-out records were scored.
{% else %}
On held-out records{{ ", lower loss is better" if "loss" in judged_by }}:

| site | records |{% for metric in judged_by.values() %} {{ metric.title }}: {{ base }} |\
{{ " " ~ constant ~ " |" if constant }} tuned |{% endfor %}

|---|--:|{% for _ in judged_by %}--:|{{ "--:|" if constant }}--:|{% endfor %}

{% for site in run.sites %}
| {{ site.name }} | {{ site.records or "-" }} |{% for name, metric in judged_by.items() %} \
{{ written(metric, site.base[name]) }} |\
{% if constant %} {{ written(metric, site.majority[name]) }} |{% endif %} \
{{ written(metric, site.final[name]) }} |\
{% endfor %}

{% endfor %}
{% endif %}

{% if run %}
## Privacy

{% for sentence in run.privacy.sentences %}
{{ sentence }}
{% endfor %}

{% if run.privacy.facts %}
| | |
|---|---|
{% for name, value in run.privacy.facts %}
| {{ name }} | {{ value }} |
{% endfor %}
{% endif %}

{% if run.privacy.spent %}
| site | epsilon spent | delta | budget of the recipe | the site's own policy |
|---|--:|--:|--:|---|
{% for row in run.privacy.spent %}
| {{ row | join(" | ") }} |
{% endfor %}
{% endif %}

Not protected:

{% for text in run.privacy.unprotected %}
- {{ text }}
{% endfor %}

{% endif %}
## Limits

What the base model gets wrong this one may too. It has seen the records of these sites only, and was measured
on theirs. It is no medical or financial advice.
"""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a finished run says of the sites whose adapter is meant."""

    manifest: Mapping[str, Any]
    sites: Sequence[SiteSummary]
    withheld: bool
    privacy: PrivacyStatement


def write_card(folder: RunFolder, target: Path, usage: Usage, *, site: str = "") -> Path:
    """Write ``README.md`` into what a run has left or exported.

    Parameters
    ----------
    site : str
        The site whose own adapter it is; empty: that of all sites.

    Raises
    ------
    RunError
        If settings, events or manifest cannot be read, or the card cannot be written.
    """
    events, manifest = read_events(folder), read_manifest(folder)
    config = as_told(load_config(folder), events)
    if manifest is None:
        return write_plain_card(config, target, usage, site=site)
    everyone = site_summaries(events)
    sites = [one for one in everyone if site in ("", one.name)]
    run = _Run(
        manifest=manifest,
        sites=sites,
        withheld=metrics_withheld(config),
        privacy=privacy_statement(
            config,
            epsilons={one.name: one.epsilon for one in sites},
            simulated=manifest["simulated"],
            whole_sites=whole_sites_spent(events),
            heldout=total(sites).heldout_epsilon,
            limits=site_limits(folder, [one.name for one in sites]),
        ),
    )
    by = count(len(everyone), "simulated site" if manifest["simulated"] else "site")
    return _write(config, target, usage, site=site, by=by, run=run)


def write_plain_card(config: Config, target: Path, usage: Usage, *, site: str = "") -> Path:
    """Write ``README.md`` where a run's results are not at hand: at a site, or before its end.

    Raises
    ------
    RunError
        If the card cannot be written.
    """
    return _write(config, target, usage, site=site, by=count(config.federation.sites, "site"), run=None)


def _write(config: Config, target: Path, usage: Usage, *, site: str, by: str, run: _Run | None) -> Path:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    text = environment.from_string(TEMPLATE).render(
        front=f"---\n{_front(config, usage).to_yaml()}\n---",
        title=_title(config, usage, site),
        what=f"{_what(config, usage, site)}, {_how(config, by)}.",
        config=config,
        method=METHODS[config.adapter.method].title,
        use=use_section(config, usage),
        task=_task(config),
        wording=_wording(config, usage),
        training=_training(config),
        run=run,
        judged_by=judged_by(config),
        base=base_name(config),
        constant=_CONSTANT.get(config.data.task, ""),
        written=_written,
    )
    path = target / "README.md"
    atomic_write(path, ModelCard(text).content.encode())
    return path


def _title(config: Config, usage: Usage, site: str) -> str:
    method, base = METHODS[config.adapter.method].title, config.model.called
    what = f"{base} with a {method} adapter merged" if usage.merged else f"{method} adapter of {base}"
    return f"{what}, site {site}" if site else what


def _what(config: Config, usage: Usage, site: str) -> str:
    whose = f"site {site}'s own adapter" if site else "an adapter"
    if usage.merged:
        return f"`{config.model.called}` with {whose} merged into it"
    return f"{whose[0].upper()}{whose[1:]} for `{config.model.called}`"


def _how(config: Config, by: str) -> str:
    rounds = f"over {count(config.federation.rounds, 'round')} with fedllm"
    match config.federation.mode:
        case "local":
            return f"trained by {by} {rounds}, each alone: a baseline"
        case "central":
            return f"trained {rounds} on the pooled records of {by}: a baseline"
        case _:
            return f"trained together by {by} {rounds}; only adapter matrices left a site"


def _training(config: Config) -> str:
    train, central = config.train, config.federation.mode == "central"
    records = f"{train.batch_size * train.accumulation} records{'' if central else ' a site'}"
    quantised = config.model.quantization
    base = f", on a {quantised} base (bitsandbytes)" if quantised != "none" else ""
    return (
        f"{count(config.federation.rounds, 'round')} of {count(config.site_steps, 'step')} of {records}{base}"
    )


def _task(config: Config) -> str:
    if config.train.objective == "dpo":
        return f"preferences between answers (DPO, beta {config.train.dpo_beta:g})"
    return _TASKS[config.data.task]


def _wording(config: Config, usage: Usage) -> list[tuple[str, str]]:
    """Return the rows that say what the model is asked and what it answers with."""
    rows = []
    if config.data.task == "classify":
        found = "those found in the sites' records; the recipe lists none"
        rows.append(("labels, in order", _cell(" | ".join(usage.labels)) or found))
    if config.model.kind == "causal":
        # as Python writes it: a line break stays visible
        shown = {"instruction": usage.instruction, "prompt": config.data.prompt}
        rows += [(name, f"`{_cell(repr(text))}`" if text else "none") for name, text in shown.items()]
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _front(config: Config, usage: Usage) -> ModelCardData:
    tags = ["federated-learning", config.adapter.method, config.strategy.name]
    if config.privacy.enabled or config.site_privacy.enabled:
        tags.append("differential-privacy")
    causal = config.model.kind == "causal"
    return ModelCardData(
        base_model=config.model.called,
        library_name="transformers" if usage.merged else "peft",
        pipeline_tag="text-generation" if causal else "text-classification",
        tags=tags,
    )


def _written(metric: Metric, value: float | None) -> str:
    return "-" if value is None else metric.text(value)
