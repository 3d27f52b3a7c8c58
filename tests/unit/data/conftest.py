"""A byte-level tokenizer with a chat template, built in memory."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nI am a default"
    "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(*, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Chat tokenizer whose template, like SmolLM2's, has a system message of its own."""
    built = build_tokenizer(merges=(("a", "b"), ("ab", "ab"), ("Ġ", "a"), ("Ã", "¤")))
    built.chat_template = TEMPLATE
    return built


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of a base model, without a chat template."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def strict_tokenizer() -> PreTrainedTokenizerFast:
    """Chat tokenizer whose template refuses a system message."""
    built = build_tokenizer()
    built.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    )
    return built


@pytest.fixture(scope="session")
def deaf_tokenizer() -> PreTrainedTokenizerFast:
    """Chat tokenizer whose template passes over a system message."""
    built = build_tokenizer()
    built.chat_template = (
        "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    )
    return built
