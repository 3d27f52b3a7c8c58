"""Records as tokens: chat prompts cut to length, and padded batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedllm.data.options import listed
from fedllm.data.records import Example
from fedllm.errors import DataError, ModelError

_FIELD = re.compile(r"\{text\}|\{pair\}|\{options\}")
#: A system message that no template has of itself.
_SENTINEL = "7301946528"


@dataclass(frozen=True)
class Encoded:
    """A record as tokens.

    Attributes
    ----------
    prompt : tuple[int, ...]
        Everything up to where the answer begins.
    answer : tuple[int, ...]
        The answer and the token that ends it; empty for an encoder.
    truncated : bool
        Whether the record's text lost its end.
    segments : tuple[int, ...]
        Which of two texts each token belongs to, where an encoder asks for it.
    rejected : tuple[int, ...]
        The answer that ``answer`` is preferred to, with its end; empty without preferences.
    options : int
        How many of the first labels the record lets choose from; 0: all of them.
    row : int
        The row of an encoder's head that stands for the record's label.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    truncated: bool
    segments: tuple[int, ...] = ()
    rejected: tuple[int, ...] = ()
    options: int = 0
    row: int = 0

    @property
    def length(self) -> int:
        """Return the tokens of the record's longest row."""
        return len(self.prompt) + max(len(self.answer), len(self.rejected))


#: No site's record: what is tried before private ones are, for any kind of model and objective.
PUBLIC = Encoded((0, 0), (0,), truncated=False, rejected=(0,))


def padded_length(length: int, multiple: int) -> int:
    """Return the length rounded up.

    >>> padded_length(9, 8), padded_length(9, 1)
    (16, 9)
    """
    return -(-length // multiple) * multiple


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

    Nothing in a record becomes a special token: where a text has one's name in it, a prompt has it with
    a blank behind its first sign, and an answer as plain letters. Those in the recipe's own texts stay.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer with an end-of-sequence token.
    instruction : str
        System message. An empty one is passed on as such, because some templates put in a
        message of their own where there is none. A template without a system role, or that passes
        over it, has it at the top of the user message.
    prompt : str
        User message; ``{text}`` and ``{pair}`` stand for the record's texts, ``{options}`` for its
        lettered options, which otherwise follow on lines of their own.
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
        self._special = _special_names(tokenizer)
        self._system_role = tokenizer.chat_template is not None and _has_system_role(tokenizer)

    def prompt_ids(self, text: str, pair: str = "", options: Sequence[str] = ()) -> list[int]:
        """Return the tokens of the whole prompt of a record's texts and options, however long."""
        texts = {"{text}": text, "{pair}": pair, "{options}": listed(options)}
        shown = not options or "{options}" in self._prompt
        prompt = self._prompt if shown else f"{self._prompt}\n{{options}}"
        # at odd places are the recipe's own special tokens
        user = "".join(
            part if place % 2 else self._plain(_FIELD.sub(lambda found: texts[found[0]], part))
            for place, part in enumerate(self._special.split(prompt))
        )
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
        ids = self._tokenizer(label, add_special_tokens=False, split_special_tokens=True).input_ids
        return (*(int(token) for token in ids), int(self._tokenizer.eos_token_id))

    def encode(self, example: Example) -> Encoded:
        """Return a record's tokens, at most ``max_length`` of them.

        Only the record's first text is cut, at its end; template, second text, options and answers stay
        whole.
        Both answers of a preference follow the same prompt.

        Raises
        ------
        DataError
            If those alone are too long.
        """
        answer = self.answer_ids(example.label)
        rejected = self.answer_ids(example.rejected) if example.rejected else ()
        longest = max(len(answer), len(rejected))
        room = self._max_length - longest
        prompt = self.prompt_ids(example.text, example.pair, example.options)
        cut = len(prompt) > room
        if cut:
            fixed = len(self.prompt_ids("", example.pair, example.options))
            if fixed > room:
                rest = "options" if example.options else "second text"
                raise DataError(
                    f"an answer of {longest} tokens and {fixed} of instruction, template and {rest} do "
                    f"not fit in train.max_length={self._max_length}; raise it."
                )
            prompt = self._cut_prompt(example, room, fixed)
        return Encoded(tuple(prompt), answer, truncated=cut, rejected=rejected, options=len(example.options))

    def _plain(self, text: str) -> str:
        """Return a text in which no special token is named: a blank is put into each name."""
        # a blank can make another name, where one is the end of another
        while (broken := self._special.sub(lambda name: f"{name[0][0]} {name[0][1:]}", text)) != text:
            text = broken
        return text

    def _cut_prompt(self, example: Example, room: int, fixed: int) -> list[int]:
        """Return the prompt of the longest prefix of whole tokens that fits."""
        text = example.text
        spans = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        ).offset_mapping
        places = self._prompt.count("{text}")
        keep = min(len(spans), (room - fixed) // places)
        while keep > 0:
            prompt = self.prompt_ids(text[: spans[keep - 1][1]], example.pair, example.options)
            if len(prompt) <= room:
                return prompt
            # tokens at the cut or next to the template came out differently than inside the text
            keep -= -(-(len(prompt) - room) // places)
        return self.prompt_ids("", example.pair, example.options)


class ClassEncoder:
    """Turns texts, or pairs of them, into an encoder's tokens and the label into its row.

    Nothing in a text becomes a special token.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The encoder's tokenizer.
    labels : Sequence[str]
        The head's rows, in order.
    max_length : int
        Most tokens of a record; the longer text is cut first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, labels: Sequence[str], max_length: int) -> None:
        self._tokenizer = tokenizer
        self._rows = {label: row for row, label in enumerate(labels)}
        self._max_length = max_length

    def encode(self, example: Example) -> Encoded:
        """Return a record's tokens; its answer is the row of its label.

        Raises
        ------
        DataError
            If the head has no row for its label.
        """
        if example.label not in self._rows:
            raise DataError("a label is not in data.labels.")
        texts = (example.text, example.pair) if example.pair else (example.text,)
        whole = self._tokenizer(*texts, split_special_tokens=True)
        found = self._tokenizer(
            *texts, split_special_tokens=True, truncation=True, max_length=self._max_length
        )
        cut = len(found.input_ids) < len(whole.input_ids)
        segments = found.get("token_type_ids", ())
        row = self._rows[example.label]
        return Encoded(tuple(found.input_ids), (), truncated=cut, segments=tuple(segments), row=row)


@dataclass(frozen=True)
class ClassBatch:
    """An encoder's padded records.

    Attributes
    ----------
    inputs : dict[str, Tensor]
        ``input_ids``, ``attention_mask`` and, where the encoder has them, ``token_type_ids``; (B, T).
    rows : Tensor
        The head's row of each record's label, shape (B,).
    """

    inputs: dict[str, Tensor]
    rows: Tensor


def collate_classes(batch: Sequence[Encoded], pad_id: int, *, multiple: int = 1) -> ClassBatch:
    """Pad an encoder's records to one length, a multiple of ``multiple``, on the right."""
    width = padded_length(max(len(record.prompt) for record in batch), multiple)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)

    inputs = {
        "input_ids": padded([record.prompt for record in batch], pad_id),
        "attention_mask": padded([[1] * len(record.prompt) for record in batch], 0),
    }
    if batch[0].segments:
        inputs["token_type_ids"] = padded([record.segments for record in batch], 0)
    return ClassBatch(inputs, torch.tensor([record.row for record in batch]))


def collate(batch: Sequence[Encoded], pad_id: int, *, multiple: int = 1) -> Batch:
    """Pad records to one length, a multiple of ``multiple``, on the right.

    Returns
    -------
    Batch
        B = ``len(batch)``, T = the longest record's tokens, rounded up.
    """
    width = padded_length(max(len(record.prompt) + len(record.answer) for record in batch), multiple)
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
    messages = [{"role": "system", "content": _SENTINEL}, {"role": "user", "content": ""}]
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError:
        return False
    return _SENTINEL in rendered


def _special_names(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds special tokens by name in a text; a name of one sign is that sign."""
    names = {token.content.strip() for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted((name for name in names if len(name) > 1), key=lambda name: (-len(name), name))
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
