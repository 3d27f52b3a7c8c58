"""Every aggregation rule on adapter states: order, identity, zero updates, exactness, gauge, ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters import METHODS
from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.aggregation import RULES, Outcome, Rule, Update
from fedllm.aggregation.factors import factor_mean
from fedllm.aggregation.lowrank import LowRank, stack
from fedllm.aggregation.products import ProductRule
from fedllm.aggregation.rule import branches_of, product_of, start_for, trained_names
from fedllm.aggregation.spectral import back_project, range_of, sketch
from fedllm.errors import RunError
from fedllm.settings import StrategySettings

SHAPES = {"a": (9, 7), "b": (6, 8)}
OF = {"ffa": "ffa", "fed-sb": "fed-sb", "ravan": "ravan", "average": "hydra"}
#: The rules' results are stored in float32.
CLOSE = 2e-6


def make_spec(name: str, rank: int = 3, scale: float = 1.0) -> AdapterSpec:
    method = OF.get(name, "lora")
    return AdapterSpec(
        method=method,
        rank=rank,
        scale=scale,
        shapes=SHAPES,
        basis="seeded:00" if METHODS[method].has_basis else "none",
        base="x",
        heads=2 if method == "ravan" else 1,
        head={"classifier": (3, 7)},
    )


def make_rule(name: str) -> Rule:
    return RULES[name](StrategySettings(energy=1.0), private=False)


def noise(state: AdapterState, rng: np.random.Generator, size: float = 0.3) -> AdapterState:
    return state.with_tensors(
        {
            key: (value + size * rng.standard_normal(value.shape)).astype(np.float32)
            for key, value in state.tensors.items()
        }
    )


def sent(rule: Rule, current: AdapterState, trained: AdapterState) -> AdapterState:
    """Return what a site sends: what the plan says, of a state whose other matrices did not move."""
    plan = rule.plan(current.spec, 1)
    moved = current if trained.spec == current.spec else start_for(current, trained.spec)
    whole = moved.updated(trained.only(plan.train))
    if not plan.sketch:
        return whole.only(plan.send)
    rng = np.random.default_rng(0)
    head = {key: value for key, value in whole.tensors.items() if key.startswith("classifier")}
    tests = {m: rng.standard_normal((n, 12)) for m, (_, n) in SHAPES.items()}
    found = {f"{b[0]}.Y": sketch(product_of(whole, b), tests[b[0]]) for b in branches_of(whole.spec)}
    return AdapterState(whole.spec, {**whole.tensors, **found, **head})


def combine(name: str, current: AdapterState, states: list[AdapterState], weights: list[float]) -> Outcome:
    rule = make_rule(name)
    messages = [sent(rule, current, state) for state in states]
    if rule.plan(current.spec, 1).sketch:
        shares = np.array(weights) / sum(weights)
        bases = {
            m: range_of(sum(p * s.tensors[f"{m}.Y"].astype(np.float64) for p, s in zip(shares, messages)))  # noqa: B905
            for m in SHAPES
        }
        projected = []
        for message in messages:
            found = {f"{m}.Q": basis for m, basis in bases.items()}
            for branch in branches_of(message.spec):
                found[f"{branch[0]}.Z"] = back_project(product_of(message, branch), bases[branch[0]])
            head = {k: v for k, v in message.tensors.items() if k.startswith("classifier")}
            projected.append(AdapterState(message.spec, {**found, **head}))
        messages = projected
    updates = [
        Update(site=f"s{index}", state=message, weight=weight)
        for index, (message, weight) in enumerate(zip(messages, weights, strict=True))
    ]
    return rule.combine(current, updates, round=1)


def whole_products(name: str, outcome: Outcome) -> dict[tuple[str, str, str], np.ndarray]:
    """Return every branch's dense change after a round, what was folded included."""
    state = outcome.state
    found = {}
    for branch in branches_of(state.spec):
        term = product_of(state, branch)
        dense = term.up @ term.down
        if outcome.folded is not None and branch[0] in outcome.folded:
            # a rule that restarts its sites has folded the whole change
            up, down = outcome.folded[branch[0]]
            dense = up @ down + (0 if make_rule(name).plan(state.spec, 1).restart else dense)
        found[branch] = dense
    return found


def start(name: str, rng: np.random.Generator, rank: int = 3, scale: float = 1.0) -> AdapterState:
    return noise(METHODS[OF.get(name, "lora")].initial_state(make_spec(name, rank, scale), seed="0"), rng)


CASE = (st.integers(0, 2**32), st.integers(1, 5))


@settings(deadline=None, max_examples=15)
@given(*CASE)
@pytest.mark.parametrize("name", RULES)
def test_the_order_of_sites_changes_nothing(name: str, seed: int, sites: int) -> None:
    rng = np.random.default_rng(seed)
    current = start(name, rng)
    states = [noise(current, rng) for _ in range(sites)]
    weights = [float(weight) for weight in rng.uniform(0.1, 5, sites)]
    order = rng.permutation(sites)
    one = combine(name, current, states, weights)
    two = combine(name, current, [states[i] for i in order], [weights[i] for i in order])
    left, right = whole_products(name, one), whole_products(name, two)
    assert all(np.allclose(left[branch], right[branch], atol=CLOSE) for branch in left)
    rest = [key for key in one.state.tensors if not branches_of(current.spec) or key.startswith("classifier")]
    assert rest
    assert all(np.allclose(one.state.tensors[k], two.state.tensors[k], atol=CLOSE) for k in rest)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32))
@pytest.mark.parametrize("name", RULES)
def test_one_site_is_the_identity_in_the_product(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    current = start(name, rng)
    trained = noise(current, rng)
    rule = make_rule(name)
    expected = current.updated(trained.only(rule.plan(current.spec, 1).train))
    shared = rule.plan(current.spec, 1).personal
    outcome = combine(name, current, [trained], [2.0])
    if branches_of(current.spec) and not shared:
        for branch, found in whole_products(name, outcome).items():
            term = product_of(expected, branch)
            assert np.allclose(found, term.up @ term.down, atol=1e-5)
    else:
        for key in sorted(outcome.state.tensors):
            if key.rpartition(".")[2] not in shared:
                assert np.allclose(outcome.state.tensors[key], expected.tensors[key], atol=CLOSE), key


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.integers(1, 4))
@pytest.mark.parametrize("name", RULES)
def test_sites_that_did_not_move_leave_everything_as_it_is(name: str, seed: int, sites: int) -> None:
    rng = np.random.default_rng(seed)
    current = start(name, rng)
    outcome = combine(name, current, [current] * sites, [1.0] * sites)
    for branch, found in whole_products(name, outcome).items():
        term = product_of(current, branch)
        assert np.allclose(found, term.up @ term.down, atol=1e-5)
    zero = METHODS[current.spec.method].initial_state(current.spec, seed="0")
    for branch, found in whole_products(name, combine(name, zero, [zero] * sites, [1.0] * sites)).items():
        assert np.allclose(found, 0, atol=1e-6), branch


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(2, 5), st.floats(0.2, 4))
@pytest.mark.parametrize("name", ["flora", "fedex", "florist", "fedsvd", "rolora"])
def test_exact_rules_give_the_weighted_sum(name: str, seed: int, sites: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    current = start(name, rng, scale=scale)
    states = [noise(current, rng) for _ in range(sites)]
    weights = [float(weight) for weight in rng.uniform(0.1, 5, sites)]
    train = make_rule(name).plan(current.spec, 1).train
    moved = [current.updated(state.only(train)) for state in states]
    for branch, found in whole_products(name, combine(name, current, states, weights)).items():
        shares = [weight / sum(weights) for weight in weights]
        total = stack([product_of(state, branch) for state in moved], shares)
        # what is stored in float32 limits the product, not the rule
        assert np.allclose(found, total.up @ total.down, atol=2e-5 * scale)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.integers(2, 4))
@pytest.mark.parametrize(
    "name", [name for name, rule in RULES.items() if rule.about.gauge_free and name != "fedask"]
)
def test_a_gauge_at_each_site_changes_nothing(name: str, seed: int, sites: int) -> None:
    rng = np.random.default_rng(seed)
    current = start(name, rng)
    states = [noise(current, rng) for _ in range(sites)]
    turned = []
    for state in states:
        gauge = np.eye(3) + 0.3 * rng.standard_normal((3, 3))
        tensors = dict(state.tensors)
        for module in SHAPES:
            tensors[f"{module}.B"] = (state.tensors[f"{module}.B"] @ gauge).astype(np.float32)
            tensors[f"{module}.A"] = (np.linalg.inv(gauge) @ state.tensors[f"{module}.A"]).astype(np.float32)
        turned.append(state.with_tensors(tensors))
    ones = [1.0] * sites
    left, right = (whole_products(name, combine(name, current, group, ones)) for group in (states, turned))
    assert all(np.allclose(left[branch], right[branch], atol=1e-4) for branch in left)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.floats(0.1, 8))
def test_fedask_balances_its_factors_whatever_the_scale(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    current = start("fedask", rng, scale=scale)
    found = combine("fedask", current, [noise(current, rng) for _ in range(2)], [1.0, 2.0]).state.tensors
    for module in SHAPES:
        up, down = (np.linalg.svd(found[f"{module}.{name}"], compute_uv=False) for name in "BA")
        assert np.allclose(up, down, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32))
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.about.unequal_ranks])
def test_unequal_ranks_and_scales_meet_in_the_product(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    current = start(name, rng, rank=4, scale=0.5)
    specs = [replace(current.spec, rank=rank, scale=2.0 / rank) for rank in (4, 2, 1)]
    states = [noise(start_for(current, spec), rng) for spec in specs]
    weights = [1.0, 3.0, 0.5]
    for branch, found in whole_products(name, combine(name, current, states, weights)).items():
        terms = [product_of(state, branch) for state in states]
        shares = [weight / sum(weights) for weight in weights]
        total = stack(terms, shares)
        dense = total.up @ total.down
        if name in ("flora", "florist"):
            assert np.allclose(found, dense, atol=1e-5)
        if name == "flexlora":
            left, values, right = np.linalg.svd(dense)
            assert np.allclose(found, (left[:, :4] * values[:4]) @ right[:4], atol=1e-5)
        if name == "fedit":
            mean = factor_mean(terms, weights)
            assert np.allclose(found, mean.up @ mean.down, atol=1e-5)
        assert np.isfinite(found).all()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 3), min_size=1, max_size=3))
@pytest.mark.parametrize("name", ["fedit", "flexlora", "raflora", "hetlora"])
def test_components_no_site_had_can_train_again(name: str, seed: int, ranks: list[int]) -> None:
    rng = np.random.default_rng(seed)
    current = start(name, rng, rank=4, scale=0.5)
    specs = [replace(current.spec, rank=rank, scale=2.0 / rank) for rank in ranks]
    states = [noise(start_for(current, spec), rng) for spec in specs]
    outcome = combine(name, current, states, [1.0] * len(states))
    rule = make_rule(name)
    assert isinstance(rule, ProductRule)
    for branch, found in whole_products(name, outcome).items():
        terms = [product_of(state, branch) for state in states]
        merged = rule.merge(terms, [1.0] * len(terms), rank=4)
        assert np.allclose(found, merged.up @ merged.down, atol=1e-5)
        term = product_of(outcome.state, branch)
        assert (term.up.any(axis=0) | term.down.any(axis=1)).all()


def test_a_site_of_a_smaller_rank_starts_from_the_first_components() -> None:
    rng = np.random.default_rng(3)
    current = start("flexlora", rng, rank=4, scale=0.5)
    small = start_for(current, replace(current.spec, rank=2, scale=1.0))
    for branch in branches_of(current.spec):
        whole, part = product_of(current, branch), product_of(small, branch)
        cut = LowRank(whole.up[:, :2], whole.down[:2])
        assert np.allclose(part.up @ part.down, cut.up @ cut.down, atol=1e-6)
    assert start_for(current, current.spec) is current
    assert list(small.tensors) == list(METHODS["lora"].trained_shapes(small.spec))


@pytest.mark.parametrize("name", RULES)
def test_no_update_is_an_error_and_names_are_those_of_the_method(name: str) -> None:
    current = start(name, np.random.default_rng(0))
    with pytest.raises(RunError):
        make_rule(name).combine(current, [], round=1)
    plan = make_rule(name).plan(current.spec, 1)
    assert set(plan.train) | set(plan.send) | set(plan.personal) <= set(trained_names(current.spec))
    assert bool(plan.personal) == RULES[name].about.personal
