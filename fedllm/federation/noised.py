"""How many private held-out records were right: counts that leave a site with noise, booked like a round."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedllm.adapters.state import AdapterState
from fedllm.config import Config
from fedllm.data.records import Example
from fedllm.errors import BudgetError
from fedllm.federation.booking import book
from fedllm.federation.counts import COUNTS, HELDOUT
from fedllm.federation.local import Start
from fedllm.federation.records import Notes
from fedllm.federation.site import Site
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import counts_plan
from fedllm.training.round import evaluate
from fedllm.training.session import Session, SiteTokens

log = logging.getLogger("fedllm.site")


def noised_counts(site: Site, notes: Notes, session: Session, tokens: SiteTokens, start: Start) -> Notes:
    """Return the noised counts of a site's private held-out records, and what the reply says of the cost.

    Nothing if the recipe asks for none, the budget of the held-out records does not allow it, or a unit may
    own several records, whose counts no bound holds for.
    """
    config = site.config
    if not config.evaluation.noise_multiplier or not (site.simulated or site.policy.private_heldout_path):
        return {}
    if config.data.unit:
        log.warning("no accuracy leaves: noised counts are for records, and here units own several.")
        return {}
    if not tokens.labels:
        log.warning("no accuracy leaves: data.labels is empty, so that no label is there to be scored.")
        return {}
    data, plan = site.data(), counts_plan(config, counts=len(COUNTS))
    try:
        booked = book(
            site,
            notes,
            plan,
            round=config.federation.rounds + 1,
            dataset=site.policy.dataset + HELDOUT,
            data=_fingerprint(data.heldout),
        )
    except BudgetError as error:
        log.warning("no accuracy leaves: %s", error)
        return {}
    rows = [
        [1.0, _right(session, one, config, start), _right(session, one, config, None)]
        for one in _one_by_one(tokens)
    ]
    sums = plan.clip({"counts": torch.tensor(rows)}) if rows else plan.zeros({"counts": (len(COUNTS),)})
    found = plan.privatise(sums, SecureGenerator())["counts"].tolist()
    noised: Notes = {f"noised_{name}": value for name, value in zip(COUNTS, found, strict=True)}
    return noised | {"heldout_epsilon": booked["epsilon"], "ledger": booked["ledger"]}


def _one_by_one(tokens: SiteTokens) -> list[SiteTokens]:
    # records that share a pass could change each other's answers
    return [
        replace(tokens, heldout=(record,), heldout_labels=(label,))
        for record, label in zip(tokens.heldout, tokens.heldout_labels, strict=True)
    ]


def _right(session: Session, one: SiteTokens, config: Config, start: Start | None) -> float:
    """Return 1 if a single record is right, 0 if it is wrong or cannot be scored."""
    state: AdapterState | None = None if start is None else start.state
    folded = None if start is None else start.folded
    try:
        scores = evaluate(session, one, config=config, state=state, records=0, folded=folded)
    except Exception as error:
        # whatever fails would tell that the record is there
        log.warning("a held-out record cannot be scored: %s.", type(error).__name__)
        return 0.0
    return float(scores.correct[0]) if scores is not None else 0.0


def _fingerprint(examples: Sequence[Example]) -> str:
    rows = sorted(json.dumps([example.text, example.pair, example.label]) for example in examples)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
