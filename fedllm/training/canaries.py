"""Canaries through the product's own private step: what its releases prove about epsilon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedllm.data.encode import Encoded
from fedllm.privacy.accounting import REPLACE, ZERO_OUT, Spend, epsilon
from fedllm.privacy.audit import Check, Scores, epsilon_by_counts, epsilon_by_gaussian
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training.steps import of_units, private_release

_SHAPES = {"first": (4, 4), "second": (2, 8)}
_CANARY, _REPLACED, _EMPTY = -1, -2, -3
_BACKGROUND = 4


@dataclass(frozen=True, kw_only=True)
class MechanismAudit:
    """What a worst-case canary shows about one release.

    Attributes
    ----------
    theory : float
        Epsilon of the release, as the accountant has it.
    by_gaussian, by_counts : float
        Lower bounds at 95 % confidence.
    trials : int
        Releases without and releases with the canary, each.
    release : str
        What is released: one step that takes every record, or one round.
    """

    theory: float
    by_gaussian: float
    by_counts: float
    trials: int
    release: str = "one full step"

    @property
    def check(self) -> Check:
        """Return the line of the audit: no lower bound may exceed the theory."""
        lower = max(self.by_gaussian, self.by_counts)
        detail = (
            f"worst-case canary, {self.trials:,} trials with and without: epsilon of {self.release} is at "
            f"least {self.by_gaussian:.2f} (Gaussian trade-off) or {self.by_counts:.2f} (counts) at 95 %; "
            f"the accountant says {self.theory:.2f}"
        )
        return Check("mechanism", lower <= self.theory, detail)

    @property
    def bounds(self) -> tuple[tuple[str, float, float], ...]:
        """Return the lower bounds beside the theory, by name, for the picture."""
        return (
            (f"{self.release}, Gaussian trade-off", self.theory, self.by_gaussian),
            (f"{self.release}, counts", self.theory, self.by_counts),
        )


def audit_mechanism(plan: PrivacyPlan, *, trials: int = 10_000) -> MechanismAudit:
    """Run the private step many times with and without a canary and bound epsilon from below.

    The canary's gradient is a thousand times the clipping norm, along one direction; the other
    records' gradients are fixed, and one of them is not finite. Every record is taken, so that
    one step is one Gaussian, whose epsilon is known exactly and is far larger than the run's: a
    step with too little noise, or clipped in the wrong place, proves more than that.
    """
    whole = replace(plan, sample_rate=1.0, cap=0)
    worlds = [_scores(whole, canary, trials) for canary in _worlds(plan.relation)]
    spend = Spend(noise_multiplier=plan.noise_multiplier, sample_rate=1.0, steps=1)
    return MechanismAudit(
        theory=epsilon([spend], delta=plan.delta, relation=plan.relation),
        by_gaussian=epsilon_by_gaussian(*worlds, delta=plan.delta),
        by_counts=epsilon_by_counts(*worlds, delta=plan.delta),
        trials=trials,
    )


def _worlds(relation: str) -> tuple[list[int], list[int]]:
    """Return the records beside the background in the two neighbouring worlds."""
    if relation == REPLACE:
        return [_REPLACED], [_CANARY]
    return ([_EMPTY] if relation == ZERO_OUT else []), [_CANARY]


def _scores(plan: PrivacyPlan, extra: Sequence[int], trials: int) -> Scores:
    """Return the canary's share in each release, in clipping norms."""
    gradients = _gradients(plan.clipping_norm)
    units = [[_record(index)] for index in (*range(_BACKGROUND), *extra)]
    plan = replace(plan, units=len(units))
    generator = SecureGenerator()

    def of_records(records: Sequence[Encoded]) -> dict[str, Tensor]:
        chosen = [gradients[record.prompt[0]] for record in records]
        return {key: torch.stack([found[key] for found in chosen]) for key in _SHAPES}

    gradients_of = of_units(of_records)
    scores = np.empty(trials)
    for trial in range(trials):
        released = private_release(
            _SHAPES,
            units,
            gradients_of=gradients_of,
            plan=plan,
            generator=generator,
            micro_batch=len(units),
        )
        scores[trial] = float(released["first"][0, 0]) * plan.expected_batch / plan.clipping_norm
    return scores


def _gradients(clipping_norm: float) -> Mapping[int, dict[str, Tensor]]:
    """Return each record's gradient: small background ones, one not finite, and the canaries."""
    source = torch.Generator().manual_seed(0)

    def towards(size: float) -> dict[str, Tensor]:
        found = {key: torch.zeros(shape) for key, shape in _SHAPES.items()}
        found["first"][0, 0] = size
        return found

    background = {
        index: {
            key: 0.3 * clipping_norm * torch.randn(shape, generator=source) for key, shape in _SHAPES.items()
        }
        for index in range(_BACKGROUND)
    }
    background[0]["second"][0, 0] = torch.nan
    size = 1000 * clipping_norm
    return {**background, _CANARY: towards(size), _REPLACED: towards(-size), _EMPTY: towards(0.0)}


def _record(index: int) -> Encoded:
    return Encoded(prompt=(index,), answer=(), truncated=False)
