"""How a written folder is used: the words and lines of code of its model card."""

from __future__ import annotations

from dataclasses import dataclass
from pprint import pformat
from typing import Literal

from jinja2 import Environment, StrictUndefined

from fedllm.config import Config

Form = Literal["adapter", "matrices", "merged", "gguf"]
_TEMPLATE = """\
{% if usage.form == "matrices" %}
PEFT cannot load this folder: it holds the trained matrices as fedllm keeps them (`fedllm_state.safetensors`).
{% if usage.personal %}
`fedllm export RUN DIR --site NAME` writes a site's own adapter as PEFT loads it, where sites were simulated.
{% else %}
`fedllm export RUN DIR` reads the base's weights and writes an adapter that PEFT loads.
{% endif %}
{% else %}
```python
{% if not encoder %}
import torch
{% endif %}
{% if usage.form == "adapter" %}
from peft import PeftModel
{% endif %}
from transformers import {{ auto }}, AutoTokenizer

{% if not encoder %}
from fedllm.data.encode import PromptEncoder
{% endif %}
{% if not encoder and not config.data.labelled %}
from fedllm.evaluation.generation import end_tokens
{% endif %}
{% if usage.embedded and not usage.merged %}
from fedllm.models.pull import pull
{% endif %}

{% if config.data.labelled %}
labels = {{ labels }}
{% endif %}
source = {{ source }}
{% if usage.merged %}
model = {{ auto }}.from_pretrained(source{{ file }}).eval()
{% else %}
base = {{ auto }}.from_pretrained(source{{ ", num_labels=len(labels)" if encoder }})
model = PeftModel.from_pretrained(base, ".").eval()  # "." is this folder
{% endif %}
tokenizer = AutoTokenizer.from_pretrained(source{{ file }})

{% if encoder %}
tokens = tokenizer(
    {{ texts }},
    split_special_tokens=True,
    truncation=True,
    max_length={{ length }},
    return_tensors="pt",
)
{% if config.model.pooling == "mean" %}
# the head reads the mean of the tokens' states, not what the model's class would give it
mask = tokens["attention_mask"].unsqueeze(-1)
states = base.base_model(**tokens).last_hidden_state
logits = base.classifier((states * mask).sum(1) / mask.sum(1))
{% else %}
logits = model(**tokens).logits
{% endif %}
print(labels[logits.argmax()])
{% else %}
encoder = PromptEncoder(
    tokenizer,
    instruction={{ instruction }},
    prompt={{ prompt }},
    max_length={{ length }},
)
prompt = encoder.prompt_ids({{ texts }})

{% if config.data.labelled %}

def score(label):
    answer = list(encoder.answer_ids(label))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, -len(answer) - 1 : -1]
    return torch.log_softmax(logits.float(), dim=-1)[range(len(answer)), answer].sum().item()


print(max(labels, key=score))
{% else %}
written = model.generate(
    input_ids=torch.tensor([prompt]),
    attention_mask=torch.ones(1, len(prompt)),
    max_new_tokens={{ config.evaluation.max_new_tokens }},
    do_sample=False,
    num_beams=1,
    repetition_penalty=1.0,
    eos_token_id=sorted(end_tokens(model, tokenizer)),
)
print(tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True))
{% endif %}
{% endif %}
```
{% if not encoder %}

Without fedllm: the instruction is the system message and the prompt the user message of the tokenizer's chat
template, and the answer begins where the assistant's turn does. A template without a system role, or one that
passes over it, has the instruction on a line above the prompt; a tokenizer without a template has
instruction, prompt and answer on lines of their own.{{ likeliest if config.data.labelled }}
{% endif %}
{% endif %}
"""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What it takes to use a folder and the settings alone do not say.

    Attributes
    ----------
    form : {"adapter", "matrices", "merged", "gguf"}
        What the folder holds: a PEFT adapter, the matrices as fedllm keeps them, or the whole model.
    file : str
        Name of the GGUF file.
    personal : bool
        Every site has an adapter of its own.
    embedded : bool
        The base is one that fedllm makes (``fedllm models ls``).
    labels : tuple[str, ...]
        The labels in order, as far as they are no site's secret.
    instruction : str
        What stands before every record.
    """

    form: Form
    file: str = ""
    personal: bool = False
    embedded: bool
    labels: tuple[str, ...]
    instruction: str

    @property
    def merged(self) -> bool:
        """Return whether the folder holds the whole model."""
        return self.form in ("merged", "gguf")


def use_section(config: Config, usage: Usage) -> str:
    """Return the lines of code that load a folder and answer one text, or how to get one that loads.

    The lines run in the folder as they are.

    Where only the base's folder is known (``model.path``) the reader has to say where it is.
    """
    kind = "CausalLM" if config.model.kind == "causal" else "SequenceClassification"
    return (
        Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)
        .from_string(_TEMPLATE)
        .render(
            config=config,
            usage=usage,
            encoder=config.model.kind == "encoder",
            auto=f"AutoModelFor{kind}",
            source=_source(config, usage),
            file=f', gguf_file="{usage.file}"' if usage.file else "",
            labels=_labels(config, usage),
            instruction=repr(usage.instruction),
            prompt=repr(config.data.prompt),
            texts=_texts(config),
            likeliest=" The likeliest label, with the token that ends a text behind it, is the answer.",
            length=config.train.max_length,
        )
        .rstrip()
    )


def _source(config: Config, usage: Usage) -> str:
    if usage.merged:
        return '"."  # this folder'
    if usage.embedded:
        return f'pull("{config.model.called}")  # fedllm makes it where it is not there yet'
    if config.model.path:
        return f'"path/to/{config.model.called}"  # the base model\'s folder'
    return f'"{config.model.called}"'


def _labels(config: Config, usage: Usage) -> str:
    if config.data.task == "choose":
        return '["A", "B"]  # one an option'
    if not usage.labels:
        return '["one label", "another"]  # those of your records: the recipe lists none'
    return pformat(list(usage.labels), width=100, compact=True)


def _texts(config: Config) -> str:
    """Return the arguments that stand for one record's texts."""
    pair = ', "A second text."' if config.data.pair else ""
    options = ', options=["the first option", "the second"]' if config.data.task == "choose" else ""
    return f'"A text."{pair}{options}'
