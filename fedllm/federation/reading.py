"""Reading a record word for word from the gradients of the two lowest layers (DAGER, arXiv 2405.15586)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch

from fedllm.config import Config
from fedllm.data.encode import Encoded
from fedllm.federation.spans import (
    Rows,
    distances,
    inputs_of_tokens,
    last_inputs,
    prepared,
    released,
    row_span,
)
from fedllm.privacy.audit import Check
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training.session import Session, SiteTokens
from fedllm.training.steps import record_gradients

#: What is farther from a span than this was not trained on: a token, or the last one of a sequence.
_FAR = 0.05


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How much of each record was read in order, from its gradient without and with privacy.

    Attributes
    ----------
    shares, private_shares : tuple[float, ...]
        Record -> share of its tokens, after the recipe's own words, up to the first one that is wrong.
    rank : int
        Of the adapters; records with as many tokens or more are not tried.
    """

    shares: tuple[float, ...]
    private_shares: tuple[float, ...]
    rank: int

    @property
    def check(self) -> Check:
        """Return the line of the audit: a measurement, not a promise."""
        if not self.shares:
            return Check("reading in order", None, f"no single text has fewer tokens than rank {self.rank}")
        whole = [sum(share == 1.0 for share in shares) for shares in (self.shares, self.private_shares)]
        detail = (
            f"{whole[0]} of {len(self.shares)} records read word for word without privacy "
            f"({np.mean(self.shares):.0%} of their tokens), {whole[1]} with "
            f"({np.mean(self.private_shares):.0%}); adapters of rank {self.rank} on two layers"
        )
        return Check("reading in order", None, detail)


def read_in_order(
    config: Config, tokens: SiteTokens, plan: PrivacyPlan, *, records: int, rank: int
) -> Reading:
    """Rebuild records from the gradients of A at the two lowest layers, as whoever sees a step could.

    The lowest layer's row span names the tokens. The second layer's input depends on all tokens before,
    so that a text is extended by the token whose state lies in that layer's span, until none does.

    Parameters
    ----------
    tokens : SiteTokens
        The site's records; the words that all prompts begin with are known from the recipe.
    plan : PrivacyPlan
        Of a step that takes the one record.
    records : int
        Most records attacked, the shortest ones.
    rank : int
        Of the attacked adapters.
    """
    attacked = config.replace(
        adapter__method="lora", strategy__name="average", adapter__rank=rank, adapter__layers="0-1"
    )
    session = prepared(attacked)
    short = (record for record in tokens.train if not record.rejected and len(_ids(record)) < rank)
    chosen = sorted(short, key=lambda record: len(_ids(record)))
    known = min(_alike(tokens.train[0].prompt, record.prompt) for record in tokens.train)
    low, high = (_first_values(session, layer) for layer in (0, 1))
    table = inputs_of_tokens(session, low.rpartition(".")[0])
    shares: tuple[list[float], list[float]] = ([], [])
    for record in chosen[:records]:
        plain = record_gradients(session, session.parameters, [record])
        noised = released(session, record, plan)
        truth = _ids(record)
        for held, lowest, second in zip(
            shares, (plain[low][0], noised[low]), (plain[high][0], noised[high]), strict=True
        ):
            near = np.flatnonzero(distances(row_span(lowest), table) <= _FAR)
            found = _extended(session, high, row_span(second), truth[:known], near.tolist())
            held.append(_alike(truth[known:], found[known:]) / len(truth[known:]))
    return Reading(shares=tuple(shares[0]), private_shares=tuple(shares[1]), rank=rank)


def _ids(record: Encoded) -> list[int]:
    return [*record.prompt, *record.answer[:-1]]


def _extended(session: Session, key: str, span: Rows, start: Sequence[int], near: Sequence[int]) -> list[int]:
    """Return the tokens that the second layer's gradient spells, after those that are known."""
    found = list(start)
    while near and len(found) < session.spec.rank:
        ids = torch.tensor([[*found, token] for token in near])
        far = distances(span, last_inputs(session, key.rpartition(".")[0], ids))
        if far.min() > _FAR:
            break
        found.append(near[int(far.argmin())])
    return found


def _first_values(session: Session, layer: int) -> str:
    """Return the key of a layer's first A, of its values where it has them.

    In the last layer keys and values alone have gradients at every position.
    """
    keys = [key for key in session.parameters if f".{layer}." in key and key.endswith(".A")]
    return next((key for key in keys if ".v_proj." in key), keys[0])


def _alike(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
