"""Records -> tokens: chat template, prompt and answer, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedllm.data.records import Example
from fedllm.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """One record as tokens; only the answer's tokens are learnt.

    Attributes
    ----------
    truncated : bool
        Whether the record's text lost its end to fit ``max_length``.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class Batch:
    """Right-padded records.

    Attributes
    ----------
    input_ids : Tensor
        Tokens, shape (B, T), int64.
    attention_mask : Tensor
        1 where a token is no padding, shape (B, T), int64.
    answer_mask : Tensor
        True where a token belongs to the answer, shape (B, T), bool.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor


class PromptEncoder:
    """Writes records with the model's chat template.

    Parameters
    ----------
    instruction : str
        System message. An empty one is still written, since templates such as SmolLM2's insert
        one of their own otherwise.
    prompt : str
        User message with ``{text}`` in the text's place.
    max_length : int
        Largest number of tokens of prompt and answer together.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, instruction: str, prompt: str, max_length: int
    ) -> None:
        self._tokenizer = tokenizer
        self._instruction = instruction
        self._prompt = prompt
        self._max_length = max_length

    def prompt_ids(self, text: str) -> list[int]:
        """Return the tokens up to where the answer begins."""
        user = self._prompt.replace("{text}", text)
        if self._tokenizer.chat_template is None:
            whole = f"{self._instruction}\n{user}\n".lstrip("\n")
        else:
            messages = [
                {"role": "system", "content": self._instruction},
                {"role": "user", "content": user},
            ]
            whole = str(
                self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        return list(self._tokenizer(whole, add_special_tokens=False)["input_ids"])

    def answer_ids(self, label: str) -> tuple[int, ...]:
        """Return an answer's tokens and the token that ends it."""
        tokens = list(self._tokenizer(label, add_special_tokens=False)["input_ids"])
        return (*tokens, int(self._tokenizer.eos_token_id))

    def encode(self, example: Example) -> Encoded:
        """Return a record's tokens; a text that is too long loses its end, nothing else does.

        Raises
        ------
        DataError
            If template and answer alone exceed ``max_length``.
        """
        answer = self.answer_ids(example.label)
        room = self._max_length - len(answer)
        prompt = self.prompt_ids(example.text)
        truncated = len(prompt) > room
        text = example.text
        while len(prompt) > room:
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            kept = len(tokens) - (len(prompt) - room)
            shorter = self._tokenizer.decode(tokens[: max(0, kept)])
            if not text:
                raise DataError(
                    f"train.max_length={self._max_length} has no room for the template and an answer of "
                    f"{len(answer)} tokens; raise it."
                )
            text = shorter if len(shorter) < len(text) else text[:-1]
            prompt = self.prompt_ids(text)
        return Encoded(prompt=tuple(prompt), answer=answer, truncated=truncated)


def collate(batch: Sequence[Encoded], pad_id: int) -> Batch:
    """Return records as one right-padded batch."""
    width = max(len(record.prompt) + len(record.answer) for record in batch)
    ids = torch.full((len(batch), width), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for row, record in enumerate(batch):
        tokens = record.prompt + record.answer
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attention[row, : len(tokens)] = 1
        answers[row, len(record.prompt) : len(tokens)] = True
    return Batch(ids, attention, answers)
