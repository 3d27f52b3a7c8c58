"""Records as tokens: chat prompts cut to length, and padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedllm.data.records import Example
from fedllm.errors import DataError, ModelError


@dataclass(frozen=True)
class Encoded:
    """A record as tokens.

    Attributes
    ----------
    prompt : tuple[int, ...]
        Everything up to where the answer begins.
    answer : tuple[int, ...]
        The answer and the token that ends it.
    truncated : bool
        Whether the record's text lost its end.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class Batch:
    """Padded records, padding on the right.

    Attributes
    ----------
    input_ids : Tensor
        Prompt, answer, padding; shape (B, T), int64.
    attention_mask : Tensor
        1 for a record's own tokens, 0 for padding; shape (B, T), int64.
    answer_mask : Tensor
        True where the token belongs to the answer, that is, is a target; shape (B, T), bool.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor


class PromptEncoder:
    """Turns texts and labels into tokens with the model's own chat template.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer with an end-of-sequence token.
    instruction : str
        System message. An empty one is passed on as such, because some templates put in a
        message of their own where there is none. A template without a system role has it at the
        top of the user message.
    prompt : str
        User message; ``{text}`` stands for the record's text.
    max_length : int
        Most tokens of prompt and answer together.

    Raises
    ------
    ModelError
        If the tokenizer has no end-of-sequence token or cannot tell where tokens begin.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, instruction: str, prompt: str, max_length: int
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token, which has to end an answer.")
        if not tokenizer.is_fast:
            raise ModelError("the tokenizer has no fast version (tokenizer.json); convert it first.")
        self._tokenizer = tokenizer
        self._instruction = instruction
        self._prompt = prompt
        self._max_length = max_length
        self._system_role = tokenizer.chat_template is not None and _has_system_role(tokenizer)
        self._fixed = len(self.prompt_ids(""))

    def prompt_ids(self, text: str) -> list[int]:
        """Return the tokens of the whole prompt of a text, however long."""
        user = self._prompt.replace("{text}", text)
        if not self._system_role and self._instruction:
            user = f"{self._instruction}\n{user}"
        if self._tokenizer.chat_template is None:
            return [int(token) for token in self._tokenizer(f"{user}\n").input_ids]
        messages = [{"role": "user", "content": user}]
        if self._system_role:
            messages.insert(0, {"role": "system", "content": self._instruction})
        rendered = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # the template writes special tokens, such as the first one, itself
        return [int(token) for token in self._tokenizer(rendered, add_special_tokens=False).input_ids]

    def answer_ids(self, label: str) -> tuple[int, ...]:
        """Return the tokens of an answer and the token that ends it."""
        ids = self._tokenizer(label, add_special_tokens=False).input_ids
        return (*(int(token) for token in ids), int(self._tokenizer.eos_token_id))

    def encode(self, example: Example) -> Encoded:
        """Return a record's tokens, at most ``max_length`` of them.

        Only the record's text is cut, at its end; template and answer stay whole.

        Raises
        ------
        DataError
            If template and answer alone are too long.
        """
        answer = self.answer_ids(example.label)
        room = self._max_length - len(answer)
        if self._fixed > room:
            raise DataError(
                f"an answer of {len(answer)} tokens and {self._fixed} of instruction and template do not "
                f"fit in train.max_length={self._max_length}; raise it."
            )
        prompt = self.prompt_ids(example.text)
        if len(prompt) <= room:
            return Encoded(tuple(prompt), answer, truncated=False)
        return Encoded(tuple(self._cut_prompt(example.text, room)), answer, truncated=True)

    def _cut_prompt(self, text: str, room: int) -> list[int]:
        """Return the prompt of the longest prefix of whole tokens that fits."""
        spans = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        places = self._prompt.count("{text}")
        keep = min(len(spans), (room - self._fixed) // places)
        while keep > 0:
            prompt = self.prompt_ids(text[: spans[keep - 1][1]])
            if len(prompt) <= room:
                return prompt
            # tokens at the cut or next to the template came out differently than inside the text
            keep -= -(-(len(prompt) - room) // places)
        return self.prompt_ids("")


def collate(batch: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad records to one length, on the right.

    Returns
    -------
    Batch
        B = ``len(batch)``, T = the longest record's tokens.
    """
    width = max(len(record.prompt) + len(record.answer) for record in batch)
    input_ids = torch.full((len(batch), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(batch), width), dtype=torch.int64)
    answer_mask = torch.zeros((len(batch), width), dtype=torch.bool)
    for row, record in enumerate(batch):
        size = len(record.prompt) + len(record.answer)
        input_ids[row, :size] = torch.tensor((*record.prompt, *record.answer), dtype=torch.int64)
        attention_mask[row, :size] = 1
        answer_mask[row, len(record.prompt) : size] = True
    return Batch(input_ids, attention_mask, answer_mask)


def _has_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": ""}]
    try:
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError:
        return False
    return True
