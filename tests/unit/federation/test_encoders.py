"""Runs with an encoder, as somebody meets them who has the adapter alone."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm.errors import ConfigError
from fedllm.federation.generate import merged_model

ENCODER = {"model__kind": "encoder", "model__name": "tiny-bert", "adapter__method": "lora"}


def test_a_model_that_would_read_something_else_is_not_merged(federate: Any) -> None:
    folder = federate(**ENCODER, model__pooling="mean", federation__rounds=1)
    with pytest.raises(ConfigError, match="model.pooling=mean"):
        merged_model(folder.path)
