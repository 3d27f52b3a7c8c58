"""A record is read word for word from a step's open gradient, and not from its private one."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm.config import Config
from fedllm.data.sites import simulated_site
from fedllm.federation.reading import Reading, read_in_order
from fedllm.models.tiny import byte_tokenizer
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training.session import SiteTokens, tokenise


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return a recipe with a base that is wider than its records are long."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            # attention that does not mix all tokens alike
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    data = folder / "records.csv"
    rows = [
        f"{name} has {what},{'ab'[row % 2]}"
        for row, (name, what) in enumerate(
            (name, what) for name in ("Ann", "Bo", "Cy", "Di") for what in ("gout", "flu", "a cold")
        )
    ]
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    return Config.from_flat(
        {
            "model.path": str(folder),
            "model.dtype": "float32",
            "data.source": "file",
            "data.path": str(data),
            "data.labels": "a | b",
            "train.max_length": 512,
            "federation.sites": 1,
            "federation.quorum": 1,
            "privacy.enabled": True,
            "privacy.epsilon": 4.0,
            "privacy.delta": 1e-3,
        }
    )


def step_of_one(units: int) -> PrivacyPlan:
    return PrivacyPlan(
        noise_multiplier=0.5,
        clipping_norm=0.1,
        units=units,
        sample_rate=1.0,
        expected_batch=1.0,
        local_steps=1,
        rounds=1,
        delta=1e-3,
        relation="add-or-remove-one",
    )


@pytest.fixture(scope="module")
def tokens(config: Config) -> SiteTokens:
    return tokenise(simulated_site(config.data, sites=1, seed=42, index=0), config)


def test_a_record_is_read_in_order_and_not_from_its_private_gradient(
    config: Config, tokens: SiteTokens
) -> None:
    found = read_in_order(config, tokens, step_of_one(1), records=2, rank=64)
    assert found.shares == (1.0, 1.0)
    assert max(found.private_shares) < 0.2
    assert "2 of 2 records read word for word without privacy (100% of their tokens), 0 with" in (
        found.check.detail
    )


def test_records_longer_than_the_rank_are_not_tried(config: Config, tokens: SiteTokens) -> None:
    found = read_in_order(config, tokens, step_of_one(1), records=2, rank=8)
    assert found == Reading(shares=(), private_shares=(), rank=8)
    assert "no single text has fewer tokens than rank 8" in found.check.detail
