"""Per-example gradients: equal to one-record backward passes and to Opacus."""

from __future__ import annotations

import copy

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from fedllm.errors import PrivacyError
from fedllm.privacy.clipping import clipped_sum
from fedllm.privacy.per_example import record_gradients


class Net(nn.Module):
    """Two trained linear maps around a frozen one, the first applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6, bias=False)
        self.frozen = nn.Linear(6, 5)
        self.last = nn.Linear(5, 3, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(self.first(torch.tanh(self.frozen(self.first(x)))))))


def trained(net: Net) -> dict[str, nn.Parameter]:
    return {"first": net.first.weight, "last": net.last.weight}


def reference(net: Net, x: Tensor) -> dict[str, Tensor]:
    rows = []
    for row in x:
        net.zero_grad()
        net(row[None]).square().sum().backward()
        rows.append({name: value.grad.clone() for name, value in trained(net).items()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("shape", [(4, 7, 5), (4, 5), (1, 3, 5)])
def test_equal_to_one_record_at_a_time(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(shape)
    expected = reference(copy.deepcopy(net), x)
    sink = record_gradients(net, trained(net))
    net(x).square().sum().backward()
    found = sink.take()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert sink.take() == {}


def test_equal_to_opacus() -> None:
    torch.manual_seed(1)
    net, x = Net(), torch.randn(4, 7, 5)
    other = copy.deepcopy(net)
    hooks = GradSampleHooks(other, loss_reduction="sum")
    other(x).square().sum().backward()
    sink = record_gradients(net, trained(net))
    net(x).square().sum().backward()
    found = sink.take()
    # Opacus keeps one entry a call of a module that is called twice
    for name, parameter in trained(other).items():
        samples = parameter.grad_sample
        expected = sum(samples) if isinstance(samples, list) else samples
        assert torch.allclose(found[name], expected, atol=1e-6)
    hooks.cleanup()


def test_a_weight_without_private_path_is_refused() -> None:
    net = Net()
    with pytest.raises(PrivacyError, match="whose bias does not train"):
        record_gradients(net, {"frozen": net.frozen.weight})
    with pytest.raises(PrivacyError, match="no per-example gradient for loose"):
        record_gradients(net, {"loose": nn.Parameter(torch.ones(2))})


def test_clipping_bounds_each_record_jointly_and_drops_nan() -> None:
    torch.manual_seed(2)
    gradients = {"a": torch.randn(5, 3, 2) * 4, "b": torch.randn(5, 4) * 0.1}
    alone = clipped_sum({name: value[:1] for name, value in gradients.items()}, clipping_norm=0.5)
    norm = sum(value.square().sum() for value in alone.values()).sqrt()
    assert norm <= 0.5 * (1 + 1e-6)
    whole = clipped_sum(gradients, clipping_norm=0.5)
    without = clipped_sum({name: value[1:] for name, value in gradients.items()}, clipping_norm=0.5)
    for name in gradients:
        assert torch.allclose(whole[name] - without[name], alone[name], atol=1e-6)
    gradients["b"][2, 1] = float("nan")
    gradients["a"][3, 0, 0] = float("inf")
    safe = clipped_sum(gradients, clipping_norm=0.5)
    kept = clipped_sum({n: v[[0, 1, 4]] for n, v in gradients.items()}, clipping_norm=0.5)
    for name in gradients:
        assert torch.allclose(safe[name], kept[name], atol=1e-6)


def test_small_gradients_are_not_scaled_up() -> None:
    gradients = {"a": torch.full((2, 2), 0.01)}
    assert torch.allclose(clipped_sum(gradients, clipping_norm=1.0)["a"], torch.full((2,), 0.02))


@pytest.mark.parametrize("norm", [1e-9, 1e-6, 0.1])
@pytest.mark.parametrize("size", [1.0, 1e20, 1e30, 1e37])
def test_no_gradient_is_too_long_to_be_clipped(norm: float, size: float) -> None:
    gradients = {"a": torch.full((1, 4), size), "b": torch.full((1, 2, 2), size)}
    found = torch.cat([value.flatten() for value in clipped_sum(gradients, clipping_norm=norm).values()])
    # below float32's smallest normal number a factor is rounded, up to several times itself
    assert float(torch.linalg.vector_norm(found.double())) <= norm * (1 + 1e-6)
