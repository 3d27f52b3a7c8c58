"""What a site books before it releases anything made of its private records."""

from __future__ import annotations

from dataclasses import replace

from fedllm.federation.records import Notes, text
from fedllm.federation.site import Site
from fedllm.privacy.accounting import Spend, epsilon
from fedllm.privacy.ledger import GENESIS
from fedllm.privacy.plan import PrivacyPlan, authorise
from fedllm.privacy.release import bucketed

#: Names under which a reply says what was booked.
BOOKED = ("epsilon", "ledger")


def booked_so_far(site: Site, notes: Notes) -> Notes:
    """Return what a site has booked for a run in all, whether or not its replies arrived in time.

    Parameters
    ----------
    notes : Notes
        The server's message: the run, and the newest hash of the ledger that the server has seen.

    Raises
    ------
    PrivacyError
        If the ledger lacks that row: a hash of an older copy must not take its place at the server.
    """
    ledger, privacy = site.ledger(), site.config.privacy
    ledger.require_head(text(notes, "ledger") or GENESIS)
    held = ledger.entries(dataset=site.policy.dataset, data=site.data().fingerprint)
    own = [entry.spend for entry in held if entry.run == text(notes, "run")]
    if not own:
        return {}
    total = epsilon(own, delta=privacy.delta, relation=privacy.relation)
    return dict(zip(BOOKED, (bucketed(total), ledger.head), strict=True))


def book(
    site: Site,
    notes: Notes,
    plan: PrivacyPlan,
    *,
    round: int,
    ahead: tuple[Spend, ...] = (),
    dataset: str = "",
    data: str = "",
) -> Notes:
    """Book one round in the site's ledger, and return what the reply says of it.

    Parameters
    ----------
    notes : Notes
        The server's message: the run, and the newest hash of the ledger that the server has seen.
    ahead : tuple[Spend, ...]
        What the run will spend beside the plan's own rounds.
    dataset, data : str
        Name and fingerprint of the records; default: the policy's, and those that train.

    Raises
    ------
    PrivacyError
        If the ledger lacks the row whose hash the server has seen; nothing is booked then.
    BudgetError
        If the policy or the budget does not allow the rest of the run; nothing is booked then.
    """
    ledger = site.ledger()
    ledger.require_head(text(notes, "ledger") or GENESIS)
    total = authorise(
        plan,
        policy=replace(site.policy, dataset=dataset or site.policy.dataset),
        ledger=ledger,
        run=text(notes, "run"),
        round=round,
        data=data or site.data().fingerprint,
        ahead=ahead,
    )
    return dict(zip(BOOKED, (bucketed(total), ledger.head), strict=True))
