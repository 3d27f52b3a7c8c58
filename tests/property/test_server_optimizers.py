"""Server optimisers against a few lines of plain arithmetic, and across a save and a load."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fedllm.aggregation.lowrank import Matrix64
from fedllm.aggregation.optimizers import (
    OPTIMIZERS,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedHyper,
    FedYogi,
    Nesterov,
    ServerOptimizer,
)
from fedllm.errors import ConfigError, RunError

Matrices = dict[str, Matrix64]
SHAPES = {"q.R": (3, 3), "v.B": (4, 2)}
ROUNDS = 6


def means(seed: int) -> list[Matrices]:
    rng = np.random.default_rng(seed)
    return [{key: rng.standard_normal(shape) for key, shape in SHAPES.items()} for _ in range(ROUNDS)]


def run(optimizer: ServerOptimizer, seed: int, *, save_after: int = -1) -> Matrices:
    current: Matrices = {key: np.zeros(shape) for key, shape in SHAPES.items()}
    moments: Matrices = {}
    for round_, mean in enumerate(means(seed)):
        current, moments = optimizer.step(current, mean, moments)
        if round_ == save_after:
            current, moments = load(save(current)), load(save(moments))
    return current


def replay(seed: int, rule: Callable[[], Callable[[Matrix64], Matrix64]]) -> Matrices:
    """Run an oracle ``Delta -> what is added`` on every matrix by itself."""
    result = {}
    for key, shape in SHAPES.items():
        x, advance = np.zeros(shape), rule()
        for mean in means(seed):
            x = x + advance(mean[key] - x)
        result[key] = x
    return result


def same(left: Matrices, right: Matrices) -> bool:
    return all(np.allclose(left[key], right[key], rtol=1e-12, atol=1e-12) for key in SHAPES)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.01, 1), st.floats(0, 0.99))
def test_momentum_and_torchs_nesterov(seed: int, lr: float, momentum: float) -> None:
    def heavy_ball() -> Callable[[Matrix64], Matrix64]:
        state = {"v": 0.0}

        def advance(delta: Matrix64) -> Matrix64:
            state["v"] = momentum * state["v"] + delta
            return lr * state["v"]

        return advance

    def torch_sgd() -> Callable[[Matrix64], Matrix64]:
        state: dict[str, Matrix64] = {}

        def advance(delta: Matrix64) -> Matrix64:
            grad = -delta
            # torch.optim.SGD: the buffer starts as the gradient, dampening 0
            state["buf"] = momentum * state["buf"] + grad if state else grad
            return -lr * (grad + momentum * state["buf"])

        return advance

    assert same(run(FedAvgM(lr=lr, momentum=momentum), seed), replay(seed, heavy_ball))
    assert same(run(Nesterov(lr=lr, momentum=momentum), seed), replay(seed, torch_sgd))


@pytest.mark.parametrize("kind", [FedAdagrad, FedAdam, FedYogi])
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.001, 1), st.floats(0, 0.99), st.floats(0, 0.99))
def test_algorithm_2_of_reddi(kind: type[FedAdam], seed: int, lr: float, beta1: float, beta2: float) -> None:
    tau = 1e-2

    def oracle() -> Callable[[Matrix64], Matrix64]:
        state = {"m": np.zeros(()), "v": np.full((), tau**2)}

        def advance(delta: Matrix64) -> Matrix64:
            m = beta1 * state["m"] + (1 - beta1) * delta
            v = {
                "FedAdagrad": lambda v: v + delta**2,
                "FedAdam": lambda v: beta2 * v + (1 - beta2) * delta**2,
                "FedYogi": lambda v: v - (1 - beta2) * delta**2 * np.sign(v - delta**2),
            }[kind.__name__](state["v"])
            state.update(m=m, v=v)
            return lr * m / (np.sqrt(v) + tau)

        return advance

    options = {"lr": lr, "beta1": beta1, "tau": tau} | ({} if kind is FedAdagrad else {"beta2": beta2})
    assert same(run(kind(**options), seed), replay(seed, oracle))


@pytest.mark.parametrize("form", ["cosine", "paper"])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_fedhyper_follows_the_agreement_of_all_matrices_together(form: str, seed: int) -> None:
    optimizer = FedHyper(gamma=4.0, form=form, gain=0.3)  # type: ignore[arg-type]
    current = {key: np.zeros(shape) for key, shape in SHAPES.items()}
    x, alpha, last = np.zeros(17), 1.0, np.zeros(17)
    moments: Matrices = {}
    for mean in means(seed):
        flat = np.concatenate([mean[key].ravel() for key in SHAPES])
        delta = flat - x
        h = float(delta @ last)
        if form == "cosine" and last.any():
            h = 0.3 * h / float(np.linalg.norm(delta) * np.linalg.norm(last))
        alpha = min(max(alpha + h, 0.25), 4.0)
        x, last = x + alpha * delta, delta
        current, moments = optimizer.step(current, mean, moments)
        assert moments["alpha"].shape == (1,)
        assert moments["alpha"][0] == pytest.approx(alpha, rel=1e-10)
    assert np.allclose(np.concatenate([current[key].ravel() for key in SHAPES]), x, rtol=1e-9, atol=1e-9)


def test_the_cosine_form_does_not_see_scale() -> None:
    for factor in (1e-6, 1e6):
        moments: list[Matrices] = [{}, {}]
        current: list[Matrices] = [{"w": np.zeros((2, 2))}, {"w": np.zeros((2, 2))}]
        for mean in means(0):
            for index, scale in enumerate((1.0, factor)):
                target = {"w": scale * mean["q.R"][:2, :2]}
                current[index], moments[index] = FedHyper().step(current[index], target, moments[index])
        assert moments[0]["alpha"] == pytest.approx(moments[1]["alpha"], rel=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_save_and_a_load_change_no_bit(name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    straight, resumed = run(optimizer, 1), run(optimizer, 1, save_after=2)
    assert all(np.array_equal(straight[key], resumed[key]) for key in SHAPES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sites_that_changed_nothing_leave_the_start_alone(name: str) -> None:
    current = means(0)[0]
    before = {key: value.copy() for key, value in current.items()}
    after, moments = OPTIMIZERS[name]().step(current, current, {})
    assert all(np.array_equal(after[key], before[key]) for key in SHAPES)
    assert all(np.isfinite(value).all() for value in moments.values())
    empty = {"w": np.zeros((3, 0))}
    assert OPTIMIZERS[name]().step(empty, empty, {})[0]["w"].shape == (3, 0)


def test_rate_one_without_momentum_is_federated_averaging() -> None:
    current, mean = means(0)[:2]
    after, _ = FedAvgM(lr=1.0, momentum=0.0).step(current, mean, {})
    assert same(after, mean)
    narrow = {key: value.astype(np.float32) for key, value in mean.items()}
    after, moments = FedAvgM().step(current, narrow, {})  # type: ignore[arg-type]
    assert {value.dtype for value in (*after.values(), *moments.values())} == {np.dtype(np.float64)}


def test_bad_input_is_refused() -> None:
    current, mean = means(0)[:2]
    with pytest.raises(RunError, match="matrices differ: v.B"):
        FedAdam().step(current, {"q.R": mean["q.R"]}, {})
    with pytest.raises(RunError, match=r"v.B has shape \(2, 4\)"):
        FedAdam().step(current, mean | {"v.B": mean["v.B"].T}, {})
    _, moments = FedAvgM().step(current, mean, {})
    with pytest.raises(RunError, match="no v/q.R"):
        FedAdam().step(current, mean, moments)
    for bad in (
        lambda: FedAvgM(lr=0.0),
        lambda: Nesterov(momentum=1.0),
        lambda: FedAdam(tau=0.0),
        lambda: FedYogi(beta2=-0.1),
        lambda: FedAdagrad(beta1=1.0),
        lambda: FedHyper(gamma=0.5),
        lambda: FedHyper(gain=0.0),
        lambda: FedHyper(form="raw"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError):
            bad()
