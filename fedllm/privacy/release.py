"""What leaves a site beside the update in a private run: an explicit list, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedllm.errors import PrivacyError


@dataclass(frozen=True)
class Release:
    """How one value may leave.

    Attributes
    ----------
    treatment : str
        ``free``: does not depend on private records. ``bucketed``: rounded, see ``reason``.
        ``public``: computed on held-out records that their owner declares public, with an adapter
        that is already private. ``accounted``: noised by a mechanism of its own, which the ledger
        books. ``salted``: a hash that hides what it stands for. ``simulated``: leaves simulated
        sites only, whose records the coordinator holds anyway.
    """

    treatment: str
    reason: str


_ON_PUBLIC = Release("public", "measured on public held-out records")
_METRICS = (
    "loss",
    "accuracy",
    "macro_f1",
    "brier",
    "ece",
    "perplexity",
    "exact_match",
    "token_f1",
    "rouge_l",
    "unended",
    "interval_low",
    "interval_high",
    "calibration",
)

#: Everything a site's private reply may carry, by name; what is not here does not leave.
RELEASES: dict[str, Release] = {
    "site": Release("free", "the site's name in the run"),
    "simulated": Release("free", "whether the site is simulated"),
    "fedllm": Release("free", "version of the software"),
    "rank": Release("free", "the adapter rank of the site's policy"),
    "projections": Release("free", "checks of the frozen basis, which a seed gives"),
    "has_basis": Release("free", "whether the shipped basis is here"),
    "weights": Release("free", "fingerprint of the base model"),
    "error": Release("free", "reason of a refusal, freed of records, counts and folders"),
    "epsilon": Release("bucketed", "spent in this run, rounded up to hundredths"),
    **dict.fromkeys(
        ("noised_records", "noised_right", "noised_base_right"),
        Release("accounted", "counts over private held-out records, with Gaussian noise"),
    ),
    "heldout_epsilon": Release("bucketed", "spent on the held-out records, rounded up to hundredths"),
    "ledger": Release("salted", "hash of the ledger's newest row"),
    "ledger_tag": Release("free", "hash of the site's and the data set's names"),
    "data": Release("simulated", "fingerprint of the records"),
    **dict.fromkeys(
        (
            *(f"{stage}{name}" for stage in ("", "base_", "elsewhere_") for name in ("records", *_METRICS)),
            "majority_accuracy",
            "majority_macro_f1",
        ),
        _ON_PUBLIC,
    ),
}
#: What stays at the site in a private run, and why.
WITHHELD = {
    "train_loss": "the mean loss of private records",
    "examples": "the number of private records; averaging is uniform instead",
    "sample rate, noise multiplier": "they tell the number of private records",
    "gradient norms, share of clipped records": "they depend on private records",
    "durations": "the site sends none; the coordinator sees when a reply arrives",
}


def require_released(names: Iterable[str], *, metrics_public: bool, simulated: bool) -> None:
    """Refuse a private reply that carries a value outside the list.

    Raises
    ------
    PrivacyError
        Naming the value.
    """
    leaving = (("public", metrics_public), ("simulated", simulated))
    closed = {treatment for treatment, allowed in leaving if not allowed}
    for name in names:
        release = RELEASES.get(name)
        if release is None or release.treatment in closed:
            raise PrivacyError(f"'{name}' may not leave a site in a private run; nothing was sent.")


def bucketed(epsilon: float) -> float:
    """Return an epsilon rounded up to hundredths."""
    return math.ceil(epsilon * 100 - 1e-9) / 100
