"""The rate of a step, and how records come together in a pass."""

from __future__ import annotations

from fedllm.config import Config
from fedllm.data.encode import Encoded
from fedllm.training.steps import learning_rate, unit_batches


def test_schedule_runs_over_the_whole_run() -> None:
    train = Config.from_flat({"train.lr": 1.0, "train.warmup": 0.2}).train
    rates = [learning_rate(train, step=step, total=10) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.05
    constant = Config.from_flat({"train.lr": 1.0, "train.schedule": "constant"}).train
    assert {learning_rate(constant, step=step, total=10) for step in range(10)} == {1.0}


def test_records_of_a_pass_have_one_padded_length() -> None:
    units = [[Encoded((1,) * size, (2,), truncated=False)] for size in (30, 3, 7, 8, 15, 16, 30, 31)]
    chunks = list(unit_batches(units, 2, padding=8))
    lengths = [[unit[0].length for unit in chunk] for chunk in chunks]
    assert lengths == [[4, 8], [9, 16], [17], [31, 31], [32]]
