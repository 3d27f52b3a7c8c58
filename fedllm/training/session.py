"""A loaded base model with its adapter, and a site's records as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.adapters import METHODS, AdapterMethod
from fedllm.adapters.basis import Basis
from fedllm.adapters.method import inject, trained_parameters
from fedllm.adapters.state import AdapterSpec
from fedllm.config import Config, ModelSettings
from fedllm.data.encode import Batch, Encoded, PromptEncoder
from fedllm.data.sites import SiteData
from fedllm.errors import ModelError
from fedllm.models.fingerprint import weights_fingerprint
from fedllm.models.load import load_base, load_tokenizer
from fedllm.privacy.per_example import GradientSink, record_gradients


@dataclass(frozen=True, kw_only=True)
class Session:
    """A base model prepared for one adapter spec.

    Attributes
    ----------
    model : nn.Module
        The PEFT model.
    base : PreTrainedModel
        The causal language model inside it, adapter included.
    parameters : dict[str, nn.Parameter]
        Key (as in the adapter state) -> trained parameter.
    sink : GradientSink or None
        Where per-example gradients arrive in private runs.
    weights : str
        Fingerprint of the base weights.
    """

    method: AdapterMethod
    spec: AdapterSpec
    model: nn.Module
    base: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    sink: GradientSink | None
    weights: str
    pad_id: int


@dataclass(frozen=True, kw_only=True)
class SiteTokens:
    """A site's records as tokens.

    Attributes
    ----------
    label_tokens : tuple
        Tokens of every label text, each with the token that ends an answer; empty for free text.
    """

    name: str
    train: tuple[Encoded, ...]
    heldout: tuple[Encoded, ...]
    train_labels: tuple[str, ...]
    heldout_labels: tuple[str, ...]
    labels: tuple[str, ...]
    label_tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class _SessionKey:
    """What decides whether a loaded model can be used again."""

    model: ModelSettings
    digest: str
    private: bool
    dropout: float
    spec: AdapterSpec = field(compare=False)
    basis: Basis = field(compare=False)


@lru_cache(maxsize=1)
def _open(key: _SessionKey) -> Session:
    method, spec = METHODS[key.spec.method], key.spec
    base = load_base(key.model)
    weights = weights_fingerprint(base)
    _require_plain_head(base)
    wrapped = inject(method, base, spec, key.basis, dropout=key.dropout)
    parameters = trained_parameters(method, wrapped)
    return Session(
        method=method,
        spec=spec,
        model=wrapped,
        base=base,
        parameters=parameters,
        sink=record_gradients(wrapped, parameters) if key.private else None,
        weights=weights,
        pad_id=int(load_tokenizer(key.model).pad_token_id),
    )


def open_session(config: Config, spec: AdapterSpec, basis: Basis) -> Session:
    """Return the session of a spec; a process keeps the newest one loaded between messages.

    Raises
    ------
    ModelError
        If the base cannot be loaded, or its output head is of a kind not understood here.
    """
    return _open(
        _SessionKey(
            model=config.model,
            digest=spec.digest,
            private=config.privacy.enabled,
            dropout=config.adapter.dropout,
            spec=spec,
            basis=basis,
        )
    )


@lru_cache(maxsize=16)
def _encoder(config_key: tuple[ModelSettings, str, str, int]) -> PromptEncoder:
    model, instruction, prompt, max_length = config_key
    return PromptEncoder(load_tokenizer(model), instruction=instruction, prompt=prompt, max_length=max_length)


@lru_cache(maxsize=32)
def tokenise(site: SiteData, config: Config) -> SiteTokens:
    """Return a site's records as tokens.

    Raises
    ------
    DataError
        If an answer alone is longer than ``train.max_length``.
    """
    encoder = _encoder((config.model, site.instruction, config.data.prompt, config.train.max_length))
    labels = site.labels if config.data.task == "classify" else ()
    return SiteTokens(
        name=site.name,
        train=tuple(encoder.encode(example) for example in site.train),
        heldout=tuple(encoder.encode(example) for example in site.heldout),
        train_labels=tuple(example.label for example in site.train),
        heldout_labels=tuple(example.label for example in site.heldout),
        labels=labels,
        label_tokens=tuple(encoder.answer_ids(label) for label in labels),
    )


def record_losses(base: PreTrainedModel, batch: Batch) -> Tensor:
    """Return each record's loss: the mean over its own answer tokens, shape (B,), float32.

    Only answer positions reach the output head. The mean never mixes records: a loss over the
    batch's tokens would make one record's gradient depend on the lengths of the others, and
    clipping would no longer bound its influence.
    """
    device = base.device
    hidden = base.get_decoder()(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        use_cache=False,
    ).last_hidden_state[:, :-1]
    rows, columns = batch.answer_mask[:, 1:].nonzero(as_tuple=True)
    logits = base.get_output_embeddings()(hidden[rows.to(device), columns.to(device)])
    targets = batch.input_ids[rows, columns + 1].to(device)
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    counts = torch.bincount(rows, minlength=len(batch.input_ids)).clamp_min(1).to(device)
    return losses.new_zeros(len(batch.input_ids)).index_add(0, rows.to(device), losses) / counts


def _require_plain_head(base: PreTrainedModel) -> None:
    """Refuse a model whose logits are not its output head on the decoder's last hidden state."""
    probe: Sequence[int] = (1, 2, 3)
    ids = torch.tensor([list(probe)], device=base.device)
    with torch.no_grad():
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        plain = base.get_output_embeddings()(hidden)
        whole = base(input_ids=ids, use_cache=False).logits
    if not torch.allclose(plain.float(), whole.float(), rtol=1e-2, atol=1e-2):
        raise ModelError(
            f"{type(base).__name__} changes its logits after the output head (such as soft-capping), which "
            "fedllm's loss does not follow yet; choose another base model."
        )
