"""What an honest-but-curious coordinator reads from one site's update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedllm.config import Config
from fedllm.data.encode import Encoded
from fedllm.data.sites import simulated_site
from fedllm.errors import ConfigError
from fedllm.federation.reading import Reading, read_in_order
from fedllm.federation.spans import Rows, distances, inputs_of_tokens, prepared, released, row_span
from fedllm.privacy.audit import Check
from fedllm.privacy.plan import PrivacyPlan, make_plan
from fedllm.training.session import Session, SiteTokens, tokenise
from fedllm.training.spec import adapter_spec
from fedllm.training.steps import record_gradients

_METHODS = {"A": "lora", "B": "lora", "R": "fed-sb"}


@dataclass(frozen=True, kw_only=True)
class RowSpan:
    """The row-span test on one matrix's gradient of one record.

    Attributes
    ----------
    matrix : str
        A, B or R of the lowest layer.
    truth : tuple[int, ...]
        The record's different tokens; like the guesses they are for whoever holds the record, and no
        line of the audit shows them.
    guesses, private_guesses : tuple[int, ...]
        As many best candidates of the whole vocabulary, best first, without privacy and from the
        privatised gradient.
    """

    matrix: str
    rank: int
    truth: tuple[int, ...]
    guesses: tuple[int, ...]
    private_guesses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Return the number of different tokens of the record."""
        return len(self.truth)

    @property
    def recall(self) -> float:
        """Return the share of the record's tokens among the guesses."""
        return len({*self.truth} & {*self.guesses}) / self.tokens

    @property
    def private_recall(self) -> float:
        """Return the share of the record's tokens among the guesses from the privatised gradient."""
        return len({*self.truth} & {*self.private_guesses}) / self.tokens


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Finding a site's record among candidates by its gradient.

    Attributes
    ----------
    tried, candidates : int
        Records attacked, and candidates of each, the record among them.
    found, private_found : int
        How often the record came first.
    """

    tried: int
    candidates: int
    found: int
    private_found: int


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """All attacks, with and without privacy."""

    rows: tuple[RowSpan, ...]
    reading: Reading
    matching: Matching

    @property
    def checks(self) -> list[Check]:
        """Return the lines of the audit: measurements, not promises."""
        lines = []
        for matrix in _METHODS:
            rows = [row for row in self.rows if row.matrix == matrix]
            few = [row.recall for row in rows if row.tokens < row.rank]
            many = [row.recall for row in rows if row.tokens >= row.rank]
            private = float(np.mean([row.private_recall for row in rows]))
            shares = ", ".join(
                f"{np.mean(found):.0%} where a record has {words} different tokens compared with the rank"
                for found, words in ((few, "fewer"), (many, "as many or more"))
                if found
            )
            detail = f"tokens read from the gradient of one record: {shares}; with privacy {private:.1%}"
            lines.append(Check(f"row span of {matrix}", None, detail))
        lines.append(self.reading.check)
        match = self.matching
        detail = (
            f"a record was found among {match.candidates} candidates {match.found} of {match.tried} times "
            f"without privacy, {match.private_found} with (guessing: {match.tried / match.candidates:.1f})"
        )
        lines.append(Check("candidate matching", None, detail))
        return lines


def attack_updates(config: Config, *, records: int = 8, candidates: int = 30, rank: int = 32) -> Inversion:
    """Attack single records' gradients as a coordinator would that sees every step.

    The setting favours the attacker: one record a step, the adapter on the lowest layer, where the
    input of a linear map is a function of the token alone, and the weights known.

    Parameters
    ----------
    records : int
        Records attacked, of the first site.
    candidates : int
        Records among which one has to be found by its gradient.
    rank : int
        Rank of the attacked adapters, or less where the model's matrices are smaller; twice that where
        records are read in order.

    Raises
    ------
    ConfigError
        If the recipe is not private, or its model is an encoder.
    """
    if config.model.kind == "encoder" or not config.privacy.enabled:
        raise ConfigError("the inversion audit needs a causal model and privacy.enabled=true.")
    data = simulated_site(config.data, sites=config.federation.sites, seed=config.run.seed, index=0)
    plan = replace(make_plan(config, units=len(data.units), site=data.name), units=1, sample_rate=1.0, cap=0)
    shapes = adapter_spec(config.replace(adapter__rank=1, adapter__layers="0")).shapes.values()
    smallest = min(min(shape) for shape in shapes)
    rank, reading_rank = min(rank, smallest), min(2 * rank, smallest)
    # the words of a record do not depend on the adapter that is attacked
    tokens = tokenise(data, config)
    rows: list[RowSpan] = []
    matching = None
    for method in ("lora", "fed-sb"):
        attacked = config.replace(
            adapter__method=method, strategy__name="average", adapter__rank=rank, adapter__layers="0"
        )
        session = prepared(attacked)
        chosen = _by_length(tokens, records)
        for matrix in (name for name, owner in _METHODS.items() if owner == method):
            rows += _row_spans(session, chosen, plan, matrix=matrix)
        if method == "fed-sb":
            matching = _match(session, tokens.train[:candidates], plan, tried=min(records, candidates))
    assert matching is not None, "one of the methods is Fed-SB"
    reading = read_in_order(config, tokens, plan, records=records, rank=reading_rank)
    return Inversion(rows=tuple(rows), reading=reading, matching=matching)


def _by_length(tokens: SiteTokens, count: int) -> list[Encoded]:
    """Return records from the shortest to the longest."""
    ordered = sorted(tokens.train, key=lambda record: len({*record.prompt, *record.answer, *record.rejected}))
    return [ordered[place] for place in np.linspace(0, len(ordered) - 1, count).astype(int)]


def _row_spans(
    session: Session, records: Sequence[Encoded], plan: PrivacyPlan, *, matrix: str
) -> list[RowSpan]:
    """Rank the vocabulary by the distance to the row span of a gradient; the record's tokens should lead."""
    key = next(name for name in session.parameters if name.endswith(f".{matrix}"))
    table = inputs_of_tokens(session, key.rpartition(".")[0])
    if matrix != "A":
        table = table @ _down(session, key).T
    found = []
    for record in records:
        tokens = sorted({*record.prompt, *record.answer[:-1], *record.rejected[:-1]})
        plain = record_gradients(session, session.parameters, [record])
        noised = released(session, record, plan)
        found.append(
            RowSpan(
                matrix=matrix,
                rank=session.spec.rank,
                truth=tuple(tokens),
                guesses=_nearest(plain[key][0], table, len(tokens)),
                private_guesses=_nearest(noised[key], table, len(tokens)),
            )
        )
    return found


def _nearest(gradient: Tensor, table: Rows, count: int) -> tuple[int, ...]:
    """Return the vocabulary entries nearest to the gradient's row span, nearest first."""
    distance = distances(row_span(gradient), table)
    # where everything lies in the span nothing is told: such ties count as any other order would
    best = np.argsort(distance + 1e-9 * np.random.default_rng(0).random(len(distance)))[:count]
    return tuple(best.tolist())


def _down(session: Session, key: str) -> Rows:
    """Return the matrix that stands before the attacked one, shape (rank, in)."""
    module = key.rpartition(".")[0]
    (layer,) = (
        part for name, part in session.model.named_modules() if name.endswith(f"{module}.lora_A.default")
    )
    found: Rows = layer.get_parameter("weight").detach().double().cpu().numpy()
    return found


def _match(session: Session, candidates: Sequence[Encoded], plan: PrivacyPlan, *, tried: int) -> Matching:
    """Compare a record's gradient with those of all candidates, by cosine."""
    plain = [
        _flat({k: v[0] for k, v in record_gradients(session, session.parameters, [r]).items()})
        for r in candidates
    ]
    table = torch.stack([value / value.norm().clamp_min(1e-12) for value in plain])
    tried = min(tried, len(candidates))
    noised = [_flat(released(session, candidates[place], plan)) for place in range(tried)]
    return Matching(
        tried=tried,
        candidates=len(candidates),
        found=sum(int((table @ plain[place]).argmax()) == place for place in range(tried)),
        private_found=sum(int((table @ noised[place]).argmax()) == place for place in range(tried)),
    )


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[key].double().reshape(-1) for key in sorted(tensors)])
