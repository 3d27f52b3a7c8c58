"""Try a finished classifier on a text: every label's probability, tuned and untuned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from fedllm.data.encode import ClassEncoder, PromptEncoder, collate_classes
from fedllm.data.records import Example
from fedllm.data.sources import default_instruction, public_labels
from fedllm.errors import ConfigError
from fedllm.evaluation.calibration import label_probabilities
from fedllm.evaluation.scoring import label_log_likelihoods
from fedllm.federation.generate import require_pair, tuned_model
from fedllm.models.load import load_tokenizer
from fedllm.models.pooling import class_logits
from fedllm.runs.folder import open_run
from fedllm.runs.manifest import settings_of


@dataclass(frozen=True, kw_only=True)
class LabelProbability:
    """What a label's probability is for one text.

    Attributes
    ----------
    base : float or None
        Under the untuned base; None for an encoder, whose head has learnt nothing yet.
    """

    label: str
    base: float | None
    tuned: float


def classify(folder: Path, text: str, *, pair: str = "", site: str = "") -> list[LabelProbability]:
    """Return every label's probability, the likeliest under the tuned model first.

    Parameters
    ----------
    pair : str
        The second text, where the recipe has one (``data.pair``).
    site : str
        A simulated site whose personal adapter is meant (fedsa, local).

    Raises
    ------
    ConfigError
        If the run does not classify, its adapter is virtual tokens, a text is empty, or a second one is
        missing or too much.
    RunError
        If the run has no finished adapter.
    ModelError
        If the base cannot be loaded.
    """
    config = settings_of(open_run(folder))
    if config.data.task != "classify" or config.train.objective != "sft":
        raise ConfigError(f"{folder}: the run did not learn labels; ask it with `fedllm generate`.")
    if config.adapter.method == "prompt":
        raise ConfigError(f"{folder}: an adapter of virtual tokens is not scored here.")
    if not text.strip():
        raise ConfigError("the text is empty.")
    require_pair(folder, config.data, pair)
    if config.data.source == "file" and not (config.data.path or config.data.labels):
        raise ConfigError(f"{folder}: its labels are known to the sites alone (data.labels is empty).")
    labels = public_labels(config.data)
    example = Example(text=text, label=labels[0], unit="", pair=pair)
    tokenizer, model = load_tokenizer(config.model), tuned_model(folder, site=site)
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel), "PEFT wraps what was loaded"
    pad = int(tokenizer.pad_token_id)
    before = None
    if config.model.kind == "encoder":
        record = ClassEncoder(tokenizer, labels=labels, max_length=config.train.max_length).encode(example)
        with torch.no_grad():
            inputs = collate_classes([record], pad).inputs
            scores = class_logits(inner, inputs, pooling=config.model.pooling)
    else:
        encoder = PromptEncoder(
            tokenizer,
            instruction=default_instruction(config.data),
            prompt=config.data.prompt,
            max_length=config.train.max_length,
        )
        prompts, tokens = [encoder.encode(example).prompt], [encoder.answer_ids(label) for label in labels]
        scores = label_log_likelihoods(inner, prompts, tokens, pad_id=pad)
        with model.disable_adapter():
            before = label_probabilities(label_log_likelihoods(inner, prompts, tokens, pad_id=pad).numpy())
    after = label_probabilities(scores.cpu().numpy())[0]
    return [
        LabelProbability(
            label=labels[row],
            base=None if before is None else float(before[0, row]),
            tuned=float(after[row]),
        )
        for row in np.argsort(-after, kind="stable")
    ]
