"""What a coordinator remembers of the sites' privacy ledgers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedllm.errors import RunError
from fedllm.federation.heads import LedgerHeads


def test_coordinators_of_one_home_lose_none_of_each_others_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))

    def note(server: int) -> None:
        for site in range(12):
            heads = LedgerHeads(tmp_path / f"run-{server}")
            heads.note(f"site-{server}-{site}", f"{site:02d}", simulated=False)

    with ThreadPoolExecutor(6) as servers:
        list(servers.map(note, range(6)))
    heads = LedgerHeads(tmp_path / "another")
    assert all(
        heads.seen(f"site-{server}-{site}", simulated=False) == f"{site:02d}"
        for server in range(6)
        for site in range(12)
    )


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    with pytest.raises(RunError, match="home.*cannot be written"):
        LedgerHeads(tmp_path).note("site", "0a", simulated=False)
