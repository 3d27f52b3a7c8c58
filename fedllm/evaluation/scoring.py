"""Classification by the probability of each label's text, one forward pass a batch.

Prompt and all labels stand in one row; an attention mask lets each label see the prompt and
itself only, and its positions go on from the prompt's end. The result is that of scoring every
(prompt, label) pair by itself, at the cost of one prompt and the labels' few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def label_log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    pad_id: int,
    prefix: Tensor | None = None,
) -> Tensor:
    """Return log p(label tokens | prompt), shape (prompts, labels), float32.

    Parameters
    ----------
    model : PreTrainedModel
        Causal language model with ``get_decoder()`` and an output head.
    prompts : sequence of token sequences
        Lengths may differ; none is empty.
    labels : sequence of token sequences
        Each ends with the token that ends an answer.
    prefix : Tensor or None
        Embeddings that stand before every prompt, shape (tokens, width).
    """
    width = max(len(prompt) for prompt in prompts)
    flat = [token for label in labels for token in label]
    ids = torch.full((len(prompts), width + len(flat)), pad_id)
    positions = torch.zeros_like(ids)
    visible = torch.zeros((len(prompts), 1, ids.shape[1], ids.shape[1]), dtype=torch.bool)
    block = _block_mask([len(label) for label in labels])
    for row, prompt in enumerate(prompts):
        size = len(prompt)
        ids[row, :size] = torch.tensor(prompt)
        ids[row, width:] = torch.tensor(flat)
        positions[row, :size] = torch.arange(size)
        positions[row, width:] = torch.cat([torch.arange(len(label)) + size for label in labels])
        visible[row, 0, :size, :size] = torch.ones(size, size, dtype=torch.bool).tril()
        visible[row, 0, width:, :size] = True
        visible[row, 0, width:, width:] = block
    # padding attends to itself: a row without any visible key would be NaN
    visible |= torch.eye(ids.shape[1], dtype=torch.bool)
    device = model.device
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids.to(device))
        tokens = 0 if prefix is None else len(prefix)
        if prefix is not None:
            before = prefix.to(embedded.dtype).expand(len(prompts), -1, -1)
            embedded = torch.cat([before, embedded], dim=1)
            visible = _behind(visible, tokens)
            positions = torch.cat([torch.arange(tokens).expand(len(prompts), -1), positions + tokens], dim=1)
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, lowest)
        hidden = model.get_decoder()(
            inputs_embeds=embedded,
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            use_cache=False,
        ).last_hidden_state[:, tokens:]
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts])
        sources, targets, owner = _sources(labels, width)
        rows = torch.arange(len(prompts))
        index = torch.where(sources < 0, ends[:, None], sources[None, :])
        logits = model.get_output_embeddings()(hidden[rows[:, None], index])
        chosen = torch.log_softmax(logits.float(), dim=-1)[:, torch.arange(len(targets)), targets]
    return torch.zeros(len(prompts), len(labels)).index_add_(1, owner, chosen.cpu())


def _behind(visible: Tensor, tokens: int) -> Tensor:
    """Return a mask with causal tokens put before everything, which all the rest sees."""
    rows, _, size, _ = visible.shape
    whole = torch.zeros((rows, 1, tokens + size, tokens + size), dtype=torch.bool)
    whole[:, :, :, :tokens] = torch.ones(tokens + size, tokens).tril().bool()
    whole[:, :, tokens:, tokens:] = visible
    return whole


def _block_mask(sizes: Sequence[int]) -> Tensor:
    """Return the causal mask inside each label, block-diagonal over labels."""
    mask: Tensor = torch.block_diag(  # type: ignore[no-untyped-call]
        *[torch.ones(size, size).tril() for size in sizes]
    )
    return mask.bool()


def _sources(labels: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for every label token: where it is predicted from (-1: the prompt's end), its id, its label."""
    sources: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    start = width
    for number, label in enumerate(labels):
        sources += [-1, *range(start, start + len(label) - 1)]
        targets += label
        owner += [number] * len(label)
        start += len(label)
    return torch.tensor(sources), torch.tensor(targets), torch.tensor(owner)
