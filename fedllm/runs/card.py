"""The model card beside a finished adapter, in Hugging Face's format."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from fedllm.adapters import METHODS
from fedllm.adapters.export import load_state
from fedllm.config import Config
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder, atomic_write, load_config
from fedllm.runs.limits import site_limits
from fedllm.runs.manifest import read_manifest
from fedllm.runs.measures import Metric, base_name, judged_by
from fedllm.runs.metrics import as_told, metrics_withheld
from fedllm.runs.privacy_text import privacy_statement
from fedllm.runs.sites import site_summaries
from fedllm.runs.whole_sites import whole_sites_spent

_TASKS = {"classify": "classification", "choose": "multiple choice", "generate": "free text"}
#: What the answer that is always the same is called, where there is one.
_CONSTANT = {"classify": "majority class", "choose": "majority letter"}
TEMPLATE = """{{ front }}
# {{ title }}

An adapter for `{{ config.model.name }}`, trained together by {{ sites | length }} \
{{ "simulated " if simulated }}sites over {{ config.federation.rounds }} rounds with fedllm; only adapter
matrices left a site.

| | |
|---|---|
| method | {{ method }}, rank {{ config.adapter.rank }}, aggregated by `{{ config.strategy.name }}` |
| task | {{ task }}\
{% if config.data.labels %}, labels {{ config.data.labels }}{% endif %} |
| training | {{ config.federation.rounds }} rounds of {{ config.train.local_steps }} steps of \
{{ config.train.batch_size * config.train.accumulation }} records a site |
| settings | sha256 {{ manifest["config_sha256"] }} |
| made with | {% for name, value in manifest["versions"].items() %}{{ name }} {{ value }}\
{{ ", " if not loop.last }}{% endfor %} |

## Use

```python
from peft import PeftModel
from transformers import {{ auto }}, AutoTokenizer

base = {{ auto }}.from_pretrained("{{ config.model.name }}"{{ ", num_labels=%d" % rows if rows }})
model = PeftModel.from_pretrained(base, "this/folder").eval()
{% if rows %}
tokens = AutoTokenizer.from_pretrained("{{ config.model.name }}")(["A text."], return_tensors="pt")
{% if config.model.pooling == "mean" %}
# the head reads the mean of the tokens' states, not what the model's class would give it
mask = tokens["attention_mask"].unsqueeze(-1)
states = base.base_model(**tokens).last_hidden_state
logits = base.classifier((states * mask).sum(1) / mask.sum(1))
{% else %}
logits = model(**tokens).logits
{% endif %}
{% endif %}
```

## Results

{% if withheld %}
Held-out records are private; their metrics stayed at the sites.
{% else %}
On held-out records{{ ", lower loss is better" if "loss" in judged_by }}:

| site | records |{% for metric in judged_by.values() %} {{ metric.title }}: {{ base }} |\
{{ " " ~ constant ~ " |" if constant }} this adapter |{% endfor %}

|---|--:|{% for _ in judged_by %}--:|{{ "--:|" if constant }}--:|{% endfor %}

{% for site in sites %}
| {{ site.name }} | {{ site.records or "-" }} |{% for name, metric in judged_by.items() %} \
{{ written(metric, site.base[name]) }} |\
{% if constant %} {{ written(metric, site.majority[name]) }} |{% endif %} \
{{ written(metric, site.final[name]) }} |\
{% endfor %}

{% endfor %}
{% endif %}

## Privacy

{% for sentence in privacy.sentences %}
{{ sentence }}
{% endfor %}

{% if privacy.facts %}
| | |
|---|---|
{% for name, value in privacy.facts %}
| {{ name }} | {{ value }} |
{% endfor %}
{% endif %}

{% if privacy.spent %}
| site | epsilon spent | delta | budget of the recipe | the site's own policy |
|---|--:|--:|--:|---|
{% for row in privacy.spent %}
| {{ row | join(" | ") }} |
{% endfor %}
{% endif %}

Not protected:

{% for text in privacy.unprotected %}
- {{ text }}
{% endfor %}

## Limits

What the base model gets wrong this one may too. It has seen the records of these sites only, and was measured
on theirs. It is no medical or financial advice.
"""


def write_card(folder: RunFolder) -> Path:
    """Write ``adapter/README.md`` of a finished run.

    Raises
    ------
    RunError
        If settings, events or manifest cannot be read, or the card cannot be written.
    """
    events, manifest = read_events(folder), read_manifest(folder)
    config = as_told(load_config(folder), events)
    assert manifest is not None, "a finished run has a manifest"
    sites = site_summaries(events)
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    text = environment.from_string(TEMPLATE).render(
        front=f"---\n{_front(config).to_yaml()}\n---",
        title=f"{METHODS[config.adapter.method].title} adapter of {config.model.name}",
        config=config,
        method=METHODS[config.adapter.method].title,
        auto=f"AutoModelFor{'CausalLM' if config.model.kind == 'causal' else 'SequenceClassification'}",
        rows=_rows(folder) if config.model.kind == "encoder" else 0,
        task=_task(config),
        manifest=manifest,
        simulated=manifest["simulated"],
        sites=sites,
        judged_by=judged_by(config),
        base=base_name(config),
        constant=_CONSTANT.get(config.data.task, ""),
        written=_written,
        withheld=metrics_withheld(config) or not any(site.records for site in sites),
        privacy=privacy_statement(
            config,
            epsilons={site.name: site.epsilon for site in sites},
            simulated=manifest["simulated"],
            whole_sites=whole_sites_spent(events),
            limits=site_limits(folder, [site.name for site in sites]),
        ),
    )
    path = folder.adapter_dir / "README.md"
    atomic_write(path, ModelCard(text).content.encode())
    return path


def _rows(folder: RunFolder) -> int:
    """Return the rows of an encoder's head, one a label."""
    state, _ = load_state(folder.adapter_dir)
    return max(out for out, _ in state.spec.head.values())


def _task(config: Config) -> str:
    if config.train.objective == "dpo":
        return f"preferences between answers (DPO, beta {config.train.dpo_beta:g})"
    return _TASKS[config.data.task]


def _front(config: Config) -> ModelCardData:
    tags = ["federated-learning", config.adapter.method, config.strategy.name]
    if config.privacy.enabled or config.site_privacy.enabled:
        tags.append("differential-privacy")
    causal = config.model.kind == "causal"
    return ModelCardData(
        base_model=config.model.name,
        library_name="peft",
        pipeline_tag="text-generation" if causal else "text-classification",
        tags=tags,
    )


def _written(metric: Metric, value: float | None) -> str:
    return "-" if value is None else metric.text(value)
