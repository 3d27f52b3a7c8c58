"""Whether a run helped, in words."""

from __future__ import annotations

import pytest

from fedllm.config import Config
from fedllm.runs.events import QUALITY
from fedllm.runs.sites import SiteSummary
from fedllm.runs.summary import summarise


def site(final: float, *, base: float = 0.5, interval: tuple[float, float] | None) -> SiteSummary:
    nothing = dict.fromkeys(QUALITY)
    return SiteSummary(
        name=f"site-{final}",
        majority={"accuracy": 0.4, "macro_f1": None},
        base={**nothing, "accuracy": base},
        final={**nothing, "accuracy": final},
        elsewhere=nothing,
        interval=interval,
        records=100,
        epsilon=None,
        heldout_epsilon=None,
        bytes_up=1,
        bytes_down=1,
        answered=1,
        asked=1,
    )


def helped(*sites: SiteSummary) -> str:
    answers = summarise(Config(), [], list(sites))
    return next(" ".join(answer.sentences) for answer in answers if "help" in answer.question.lower())


@pytest.mark.parametrize(
    ("lead", "width", "doubted"), [(0.10, 0.12, False), (0.08, 0.12, True), (-0.1, 0.12, False)]
)
def test_a_lead_within_the_interval_of_the_mean_is_doubted(lead: float, width: float, doubted: bool) -> None:
    # two sites: half of the mean's interval is width / sqrt 2, 0.085
    sites = [site(0.5 + lead + by, interval=(0.5 - width, 0.5 + width)) for by in (-0.01, 0.01)]
    words = helped(*sites)
    assert ("no more than other held-out records could make of it (± 8.5 points, 95 %)" in words) is doubted


def test_without_every_sites_interval_nothing_is_said_of_chance() -> None:
    assert "other held-out records" not in helped(site(0.6, interval=(0.2, 0.9)), site(0.61, interval=None))
