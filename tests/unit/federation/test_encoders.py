"""Runs with an encoder, as somebody meets them who has the adapter alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.cli.tables import final_table
from fedllm.errors import ConfigError
from fedllm.federation.generate import merged_model, tuned_model
from fedllm.models.load import load_tokenizer, resolve
from fedllm.models.pooling import class_logits
from fedllm.runs.events import read_events
from fedllm.runs.folder import load_config

ENCODER = {"model__kind": "encoder", "model__name": "tiny-bert", "adapter__method": "lora"}


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_the_cards_lines_give_the_runs_logits(federate: Any, tmp_path: Path, pooling: str) -> None:
    folder = federate(**ENCODER, model__pooling=pooling, federation__rounds=1, train__lr=0.1)
    config = load_config(folder)
    card = (folder.adapter_dir / "README.md").read_text(encoding="utf-8")
    assert "accuracy: untrained head | majority class | this adapter |" in card
    assert "untuned" not in card
    assert "untrained head" in str(final_table([("run", read_events(folder))]).caption)
    lines = card.partition("```python\n")[2].partition("```")[0]
    script = tmp_path / "use.py"
    script.write_text(
        "import json\n"
        + lines.replace("this/folder", str(folder.adapter_dir)).replace(
            '"tiny-bert"', f'"{resolve(config.model)}"'
        )
        + "print(json.dumps(logits.tolist()))\n",
        encoding="utf-8",
    )
    said = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True).stdout
    with torch.no_grad():
        expected = class_logits(
            tuned_model(folder.path).get_base_model(),  # type: ignore[arg-type]
            dict(load_tokenizer(config.model)(["A text."], return_tensors="pt")),
            pooling=pooling,
        )
    assert torch.allclose(torch.tensor(json.loads(said.splitlines()[-1])), expected, atol=1e-5)
    assert expected.abs().max() > 0.01


def test_a_model_that_would_read_something_else_is_not_merged(federate: Any) -> None:
    folder = federate(**ENCODER, model__pooling="mean", federation__rounds=1)
    with pytest.raises(ConfigError, match="model.pooling=mean"):
        merged_model(folder.path)
