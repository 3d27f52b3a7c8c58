"""FedHyper's client-side learning rate."""

from __future__ import annotations

import pytest
import torch

from fedllm.training.hyper import ClientRate


@pytest.mark.parametrize(
    ("paper", "expected"),
    [
        # cosines: with D 1 and then with the last change 1, capped at 1.1; against D: 0.9, then 1.0
        (False, {1.0: 1.1**3, -1.0: 0.9}),
        # <u, D>/steps = 0.3/4 and <u, u> = 0.03
        (True, {1.0: 1.0075 * 1.0375**2, -1.0: 0.9925 * 1.0225**2}),
    ],
)
def test_fedhyper_follows_its_formula(paper: bool, expected: dict[float, float]) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    for sign, factor in expected.items():
        with torch.no_grad():
            weight.zero_()
        rate = ClientRate({"w": weight}, {"w": sign * torch.ones(3)}, steps=4, paper=paper)
        for _ in range(3):
            with torch.no_grad():
                weight.add_(0.1)
            rate.update()
        assert rate.factor == pytest.approx(factor, rel=1e-5)


def test_fedhyper_compares_where_the_parameters_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def agreement(self: object, left: torch.Tensor, right: torch.Tensor) -> float:
        seen.append((left.device.type, right.device.type))
        return 0.0

    monkeypatch.setattr(ClientRate, "_agreement", agreement)
    weight = torch.nn.Parameter(torch.zeros(3, device="meta"))
    ClientRate({"w": weight}, {"w": torch.ones(3)}, steps=4, paper=False).update()
    assert seen == [("meta", "meta")]
