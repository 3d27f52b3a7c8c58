"""Optimisers of a site's round: Adam freed of the noise's share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedllm.config import Config
from fedllm.training.optimizers import AdamBC, make_optimizer


def walk(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: torch.Tensor) -> torch.Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_without_noise_it_is_adam() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(20, 5) + 1
    ours, theirs = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    found = walk(AdamBC([ours], lr=0.1, variance=1e-20, floor=0.1, weight_decay=0.01), ours, gradients)
    adam = torch.optim.AdamW([theirs], lr=0.1, eps=0.0, weight_decay=0.01)
    assert torch.allclose(found, walk(adam, theirs, gradients), atol=1e-5)


def test_a_step_by_hand() -> None:
    # v = 4, V = 3: the step is lr m / sqrt(4 - 3); below the floor it is lr m / sqrt(floor V)
    for gradient, floor, expected in ((2.0, 0.1, -0.2), (1.0, 0.25, -0.1 / 0.75**0.5)):
        parameter = nn.Parameter(torch.zeros(1))
        walk(AdamBC([parameter], lr=0.1, variance=3.0, floor=floor), parameter, torch.full((1, 1), gradient))
        assert float(parameter.detach()) == pytest.approx(expected)


def test_the_correction_keeps_the_signals_scale_under_noise() -> None:
    torch.manual_seed(1)
    signal, deviation = torch.tensor([0.2, 2.0]), 1.0
    gradients = signal + deviation * torch.randn(3000, 2)
    steps = {}
    for variance in (1e-20, deviation**2):
        parameter = nn.Parameter(torch.zeros(2))
        optimizer = AdamBC([parameter], lr=1e-3, variance=variance, floor=1e-3)
        steps[variance] = walk(optimizer, parameter, gradients)
    # plain Adam divides by sqrt(signal^2 + noise^2): small signals walk slower than large ones
    plain, corrected = steps[1e-20], steps[deviation**2]
    assert float(plain[0] / plain[1]) < 0.4
    assert float(corrected[0] / corrected[1]) > 0.6


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adam-bc", AdamBC)]
)
def test_the_setting_names_the_optimizer(name: str, kind: type) -> None:
    values = {"train.optimizer": name, "privacy.enabled": True, "privacy.epsilon": 1.0}
    train = Config.from_flat(values).train  # type: ignore[arg-type]
    found = make_optimizer([nn.Parameter(torch.zeros(1))], train, noise_deviation=0.1, floor=0.1)
    assert isinstance(found, kind)
