"""Runs with an encoder, as somebody meets them who has the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from fedllm.cli.tables import final_table
from fedllm.data.sources import public_labels
from fedllm.errors import ConfigError
from fedllm.federation.generate import export_merged, merged_model
from fedllm.runs.events import read_events
from fedllm.runs.folder import load_config

ENCODER = {"model__kind": "encoder", "model__name": "tiny-bert", "adapter__method": "lora"}


def test_a_merged_encoder_knows_its_labels_by_name(federate: Any, tmp_path: Path) -> None:
    folder = federate(**ENCODER, federation__rounds=1, federation__sites=1)
    labels = public_labels(load_config(folder).data)
    merged = AutoConfig.from_pretrained(export_merged(folder.path, tmp_path / "merged"))
    assert merged.id2label == dict(enumerate(labels))
    assert merged.label2id == {label: row for row, label in enumerate(labels)}
    assert merged.num_labels == len(labels)


def test_the_base_of_an_encoder_is_called_an_untrained_head(federate: Any) -> None:
    folder = federate(**ENCODER, federation__rounds=1, federation__sites=1)
    card = (folder.adapter_dir / "README.md").read_text(encoding="utf-8")
    assert "accuracy: untrained head | majority class | tuned |" in card
    assert "untuned" not in card
    assert "untrained head" in str(final_table([("run", read_events(folder))]).caption)


def test_a_model_that_would_read_something_else_is_not_merged(federate: Any) -> None:
    folder = federate(**ENCODER, model__pooling="mean", federation__rounds=1)
    with pytest.raises(ConfigError, match="model.pooling=mean"):
        merged_model(folder.path)
