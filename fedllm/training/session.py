"""A loaded base model with its adapter, and a site's records as tokens."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor, nn
from transformers import PreTrainedModel

from fedllm.adapters import METHODS, AdapterMethod
from fedllm.adapters.basis import Basis
from fedllm.adapters.method import trained_parameters
from fedllm.adapters.state import AdapterSpec, matrix_name
from fedllm.adapters.vectors import prefix_of
from fedllm.config import Config
from fedllm.data.encode import ClassEncoder, Encoded, PromptEncoder
from fedllm.data.records import Example
from fedllm.data.sites import SiteData
from fedllm.errors import DataError
from fedllm.models.fingerprint import weights_fingerprint
from fedllm.models.load import load_base, load_tokenizer, require_plain_head, require_separate_records
from fedllm.models.quiet import quiet
from fedllm.privacy.engines import ENGINES
from fedllm.privacy.per_example import Recorder
from fedllm.settings import ModelSettings
from fedllm.training.checkpointing import checkpoint_layers

log = logging.getLogger("fedllm.site")

#: In private runs records of one pass have one padded length, and it follows from each alone: padded to the
#: longest, a record would change what a model computes for the others.
PRIVATE_PADDING = 8


@dataclass(frozen=True, kw_only=True)
class Session:
    """A base model prepared for one adapter spec.

    Attributes
    ----------
    model : nn.Module
        The PEFT model.
    base : PreTrainedModel
        The causal language model or encoder inside it, adapter included.
    parameters : dict[str, nn.Parameter]
        Key (as in the adapter state) -> trained parameter.
    recorder : Recorder or None
        What hands out per-example gradients in private runs.
    weights : str
        Fingerprint of the base weights.
    pooling : str
        What an encoder's head reads, see :func:`fedllm.models.pooling.class_logits`.
    prefix : Tensor or None
        Embeddings before every prompt, shape (tokens, width), where the method has them.
    beta : float or None
        DPO's beta; None where answers are learnt as they stand.
    padding : int
        Records are padded to a multiple of this many tokens.
    """

    method: AdapterMethod
    spec: AdapterSpec
    model: nn.Module
    base: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    recorder: Recorder | None
    weights: str
    pad_id: int
    pooling: str
    prefix: Tensor | None
    beta: float | None
    padding: int

    def trainable(self, names: Collection[str]) -> dict[str, nn.Parameter]:
        """Let the matrices of these names train, and no others; return them by key."""
        chosen = {}
        for key, parameter in self.parameters.items():
            parameter.requires_grad_(matrix_name(key) in names)
            if parameter.requires_grad:
                chosen[key] = parameter
        return chosen


@dataclass(frozen=True, kw_only=True)
class SiteTokens:
    """A site's records as tokens.

    Attributes
    ----------
    units : tuple[tuple[int, ...], ...]
        The privacy units: positions in ``train`` of the records each owns; none where a private site
        cannot use them.
    own_labels : tuple[str, ...]
        Labels of the records that the site itself has to train on, also where it trains on all sites'.
    label_tokens : tuple
        Tokens of every label or letter, each with the token that ends an answer; empty for free text.
    """

    name: str
    train: tuple[Encoded, ...]
    units: tuple[tuple[int, ...], ...]
    heldout: tuple[Encoded, ...]
    own_labels: tuple[str, ...]
    heldout_labels: tuple[str, ...]
    labels: tuple[str, ...]
    label_tokens: tuple[tuple[int, ...], ...]

    @property
    def units_of_records(self) -> list[list[Encoded]]:
        """Return the privacy units, each as its training records."""
        return [[self.train[position] for position in unit] for unit in self.units]


@dataclass(frozen=True, kw_only=True)
class _SessionKey:
    """What decides whether a loaded model can be used again."""

    model: ModelSettings
    # not its name: a name that is registered again stands for another method
    method: AdapterMethod
    digest: str
    engine: str
    dropout: float
    checkpointing: bool
    beta: float | None
    spec: AdapterSpec = field(compare=False)
    basis: Basis = field(compare=False)


@lru_cache(maxsize=1)
def _open(key: _SessionKey) -> Session:
    method, spec = key.method, key.spec
    labels = max((out for out, _ in spec.head.values()), default=0)
    base = load_base(key.model, labels=labels)
    heads = [parameter for module in spec.head for parameter in base.get_submodule(module).parameters()]
    weights = weights_fingerprint(base, exclude=heads)
    if not spec.head:
        require_plain_head(base)
    if key.engine:
        require_separate_records(base)
    if key.checkpointing:
        checkpoint_layers(base)
    with quiet():
        wrapped = method.inject(base, spec, key.basis, dropout=key.dropout)
    parameters = trained_parameters(method, wrapped, spec)
    return Session(
        method=method,
        spec=spec,
        model=wrapped,
        base=base,
        parameters=parameters,
        recorder=ENGINES[key.engine](wrapped, parameters) if key.engine else None,
        weights=weights,
        pad_id=int(load_tokenizer(key.model).pad_token_id),
        pooling=key.model.pooling,
        prefix=prefix_of(wrapped),
        beta=key.beta,
        padding=PRIVATE_PADDING if key.engine else 1,
    )


def open_session(config: Config, spec: AdapterSpec, basis: Basis) -> Session:
    """Return the session of a spec; a process keeps the newest one loaded between messages.

    Raises
    ------
    ModelError
        If the base cannot be loaded, or its output head is of a kind not understood here.
    PrivacyError
        If a private run's base lets records that share a pass change each other.
    """
    return _open(
        _SessionKey(
            model=config.model,
            method=METHODS[spec.method],
            digest=spec.digest,
            engine=config.privacy.engine if config.privacy.enabled else "",
            dropout=config.adapter.dropout,
            checkpointing=config.train.gradient_checkpointing,
            beta=config.train.beta,
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
        If an answer alone is longer than ``train.max_length``, or an encoder's head has no row for a
        label; where the site is ``lenient``, such a record does not train and its unit stays.
    """
    label_tokens: tuple[tuple[int, ...], ...] = ()
    encoder: ClassEncoder | PromptEncoder
    if config.model.kind == "encoder":
        tokenizer = load_tokenizer(config.model)
        encoder = ClassEncoder(tokenizer, labels=site.labels, max_length=config.train.max_length)
    else:
        encoder = _encoder((config.model, site.instruction, config.data.prompt, config.train.max_length))
        label_tokens = tuple(encoder.answer_ids(label) for label in site.labels)
    train, heldout = (_encoded(encoder, examples, site) for examples in (site.train, site.heldout))
    places = {position: place for place, position in enumerate(train)}
    return SiteTokens(
        name=site.name,
        train=tuple(train.values()),
        units=tuple(tuple(places[one] for one in unit if one in places) for unit in site.units),
        heldout=tuple(heldout.values()),
        own_labels=site.own_labels or tuple(site.train[position].label for position in train),
        heldout_labels=tuple(site.heldout[position].label for position in heldout),
        labels=site.labels,
        label_tokens=label_tokens,
    )


def _encoded(
    encoder: ClassEncoder | PromptEncoder, examples: Sequence[Example], site: SiteData
) -> dict[int, Encoded]:
    """Return position -> tokens of the records that can be used; others are refused, or do not train."""
    found: dict[int, Encoded] = {}
    reasons: list[str] = []
    usable = ((position, example) for position, example in enumerate(examples) if example.usable)
    for position, example in usable:
        try:
            found[position] = encoder.encode(example)
        except DataError as error:
            reasons.append(str(error))
        except Exception as error:
            # a chat template can fail on texts of its own choosing
            if not site.lenient:
                raise
            reasons.append(type(error).__name__)
    if reasons:
        verdict = "do not train" if site.lenient else "cannot be used"
        told = (
            f"site {site.name}: {len(reasons)} of {len(examples)} records {verdict}; the first: {reasons[0]}"
        )
        if not site.lenient:
            raise DataError(told)
        log.warning(told)
    return found
