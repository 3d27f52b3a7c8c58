from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data.order import batch_indices
from fedllm.errors import DataError

SITES = st.text(max_size=8)


@given(n=st.integers(1, 40), batch_size=st.integers(1, 60), seed=st.integers(0, 2**32), site=SITES)
def test_every_epoch_is_a_permutation(n: int, batch_size: int, seed: int, site: str) -> None:
    steps = -(-3 * n // batch_size)
    stream = [
        index
        for step in range(steps)
        for index in batch_indices(n, batch_size=batch_size, step=step, seed=seed, site=site)
    ]
    assert len(stream) == steps * batch_size
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(n=st.integers(1, 40), batch_size=st.integers(1, 60), step=st.integers(0, 10**6))
def test_a_step_needs_no_history(n: int, batch_size: int, step: int) -> None:
    def whole(size: int, at: int) -> list[int]:
        return batch_indices(n, batch_size=size, step=at, seed=3, site="a")

    assert whole(batch_size, step) == whole(batch_size, step)
    # two half-sized steps are one full step
    assert whole(2 * batch_size, step) == whole(batch_size, 2 * step) + whole(batch_size, 2 * step + 1)


def test_seed_site_and_epoch_all_matter() -> None:
    def epoch(seed: int, site: str, number: int) -> tuple[int, ...]:
        return tuple(batch_indices(50, batch_size=50, step=number, seed=seed, site=site))

    assert len({epoch(0, "a", 0), epoch(1, "a", 0), epoch(0, "b", 0), epoch(0, "a", 1)}) == 4


def test_the_order_is_the_same_on_every_machine() -> None:
    assert batch_indices(10, batch_size=10, step=0, seed=42, site="site-0") == [7, 4, 6, 1, 3, 8, 5, 2, 9, 0]


def test_no_records_is_an_error() -> None:
    with pytest.raises(DataError, match="site a: no training records"):
        batch_indices(0, batch_size=4, step=0, seed=0, site="a")
