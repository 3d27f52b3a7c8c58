"""What an encoder's head reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from fedllm.config import Config
from fedllm.errors import ConfigError, ModelError
from fedllm.models.fingerprint import weights_fingerprint
from fedllm.models.load import load_base
from fedllm.models.pooling import class_logits
from fedllm.models.shapes import linear_shapes
from fedllm.settings import ModelSettings

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BERT = BertConfig(**SMALL, intermediate_size=32, num_labels=3)


@pytest.fixture
def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForSequenceClassification(BERT).eval()


def inputs(lengths: tuple[int, ...], *, padding: int = 0) -> dict[str, torch.Tensor]:
    """Return the same records whatever the padding behind them."""
    ids = torch.randint(3, 50, (len(lengths), 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask == 1, ids, 7)
    return {
        "input_ids": torch.nn.functional.pad(ids, (0, padding), value=7),
        "attention_mask": torch.nn.functional.pad(mask, (0, padding)),
    }


def test_a_mean_is_that_of_a_records_own_tokens(bert: Any) -> None:
    found = class_logits(bert, inputs((9, 4)), pooling="mean")
    for row, length in enumerate((9, 4)):
        alone = {name: value[row : row + 1, :length] for name, value in inputs((9, 4)).items()}
        states = bert.bert(**alone).last_hidden_state[0]
        assert torch.allclose(found[row], bert.classifier(states.mean(0)), atol=1e-6)


def test_padding_changes_nothing(bert: PreTrainedModel) -> None:
    short = class_logits(bert, inputs((9, 4)), pooling="mean")
    assert torch.allclose(short, class_logits(bert, inputs((9, 4), padding=5), pooling="mean"), atol=1e-6)


def test_the_models_own_class_is_the_other_choice(bert: PreTrainedModel) -> None:
    given = inputs((9, 4))
    found = class_logits(bert, given, pooling="model")
    assert torch.equal(found, bert(**given).logits)
    assert not torch.allclose(found, class_logits(bert, given, pooling="mean"), atol=1e-3)


def test_a_pooler_that_computes_nothing_is_not_adapted() -> None:
    def adapted(pooling: str) -> set[str]:
        return set(linear_shapes(BERT, targets="all-linear", layers="1", kind="encoder", pooling=pooling))

    assert adapted("model") - adapted("mean") == {"bert.pooler.dense"}
    assert adapted("mean") < adapted("model")


@pytest.mark.parametrize(
    "config",
    [
        RobertaConfig(**SMALL),
        # its classifier is one map, and another one stands before it
        DistilBertConfig(vocab_size=50, dim=16, n_heads=2, n_layers=1, hidden_dim=32),
    ],
)
def test_a_head_of_several_maps_is_refused(config: PretrainedConfig) -> None:
    with pytest.raises(ModelError, match="use model.pooling=model"):
        linear_shapes(config, targets="all-linear", layers="", kind="encoder", pooling="mean")


def test_a_language_model_has_no_such_head(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set model.kind=encoder"):
        Config.from_flat({"model.pooling": "mean", "run.dir": str(tmp_path)})


def test_an_encoder_without_pooler_weights_may_be_read_by_a_mean(
    bert: PreTrainedModel, tmp_path: Path
) -> None:
    weights = {key: value for key, value in bert.state_dict().items() if ".pooler." not in key}
    bert.save_pretrained(tmp_path, state_dict=weights)
    settings = ModelSettings(path=str(tmp_path), kind="encoder", dtype="float32", pooling="mean")
    prints = {weights_fingerprint(load_base(settings, labels=3).base_model) for _ in range(2)}
    assert len(prints) == 1
    with pytest.raises(ModelError, match=r"first 'bert\.pooler"):
        load_base(replace(settings, pooling="model"), labels=3)
