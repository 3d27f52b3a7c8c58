"""The byte ledger: all stages, both ways, with their sums."""

from __future__ import annotations

from typing import Any

from fedllm.runs.events import append_event, read_events
from fedllm.runs.traffic import flowertune_mib, totals, traffic, write_traffic


def test_everything_is_counted_once(make_run: Any, reply: Any) -> None:
    run = make_run()
    for stage, up, down in (("hello", 10, 100), ("basis", 0, 5000), ("evaluation", 20, 700)):
        append_event(run, "traffic", stage=stage, round=0, site="north", bytes_up=up, bytes_down=down)
    for round in (1, 2):
        reply(run, round, "north", accepted=round == 1, bytes_up=2**20, bytes_down=3 * 2**20)
        # sums of replies, not further traffic
        append_event(run, "round_finished", round=round, accepted=1, bytes_up=9, bytes_down=9, seconds=1.0)
    lines = traffic(read_events(run))
    assert totals(lines) == {
        "hello": (10, 100),
        "basis": (0, 5000),
        "training": (2 * 2**20, 6 * 2**20),
        "evaluation": (20, 700),
    }
    assert flowertune_mib(lines) == 8.0
    table = write_traffic(run).read_text().splitlines()
    assert table[0] == "stage,round,site,bytes_up,bytes_down"
    assert len(table) == 1 + 5 + 4
    assert table[-2] == f"training,all,federation,{2 * 2**20},{6 * 2**20}"
