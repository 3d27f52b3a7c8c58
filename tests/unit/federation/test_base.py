"""The baseline without training: the untuned base, measured at every site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from rich.console import Console
from typer.testing import CliRunner

from fedllm.cli.app import app
from fedllm.cli.tables import final_table
from fedllm.errors import ConfigError, RunError
from fedllm.federation.generate import export_adapter
from fedllm.privacy.ledger import Ledger
from fedllm.runs.events import read_events
from fedllm.runs.folder import load_config, open_run
from fedllm.runs.manifest import read_manifest
from fedllm.runs.sites import site_summaries

PRIVATE = {
    "privacy__enabled": True,
    "privacy__noise_multiplier": 1.0,
    "privacy__delta": 1e-4,
    "data__heldout_public": True,
}


@pytest.mark.parametrize("settings", [{}, {"adapter__basis": "public-svd"}, PRIVATE])
def test_the_base_is_measured_and_nothing_trained(
    federate: Any, events: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    kinds = set()

    def watch(message: Message, reply: Message) -> Message:
        kinds.add(message.metadata.message_type)
        return reply

    folder = federate(watch, federation__mode="base", **settings)
    assert kinds == {"query.hello", "evaluate"}
    assert [event["stage"] for event in events(folder, "evaluated")] == ["base"] * 3
    assert all(event["accuracy"] is not None for event in events(folder, "evaluated"))
    assert not any(Ledger(folder.site_dir(f"site-{n}") / "ledger.sqlite").entries() for n in range(3))
    with pytest.raises(RunError, match="there is no adapter"):
        export_adapter(folder.path, tmp_path / "out")
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["model"]["weights"]
    page = " ".join(folder.report_file.read_text().split())
    measured = "was measured on held-out descriptions of merchant categories"
    assert f"Nothing: the untuned language model tiny-llama {measured}" in page
    assert "Nothing was trained. Mean accuracy on held-out records: untuned base" in page
    assert "no update left a site, and no privacy budget was spent" in page
    assert "On average" not in page
    assert "Not measured yet" not in page


def test_its_figures_are_those_that_every_run_has(federate: Any) -> None:
    base, whole = federate(dir="base", federation__mode="base"), federate(dir="whole", federation__rounds=1)
    found, expected = (site_summaries(read_events(folder)) for folder in (base, whole))
    assert [site.base for site in found] == [site.base for site in expected]
    assert [site.majority for site in found] == [site.majority for site in expected]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(final_table([("base", read_events(base))]))
    row = next(line.split() for line in capture.get().splitlines() if "site-0" in line)
    accuracy = found[0].base["accuracy"]
    assert accuracy is not None
    assert row[2] == f"{100 * accuracy:.1f}"
    assert "withheld" not in row


def test_personal_matrices_that_never_trained_are_not_exported(federate: Any) -> None:
    folder = federate(federation__mode="base", strategy__name="fedsa", adapter__method="lora")
    assert not (folder.site_dir("site-0") / "adapter").exists()


@pytest.mark.parametrize("mode", ["base", "local"])
def test_mode_is_short_for_the_setting(tmp_path: Path, mode: str) -> None:
    words = ["run", "demo/smoke", f"run.dir={tmp_path / mode}", "federation.rounds=1", "--mode", mode]
    done = CliRunner().invoke(app, [*words, "--engine", "process"])
    assert done.exit_code == 0, done.output
    assert load_config(open_run(tmp_path / mode)).federation.mode == mode
    again = ["run", "demo/smoke", f"run.resume={tmp_path / mode}", "--mode", "central"]
    refused = CliRunner().invoke(app, again)
    assert isinstance(refused.exception, ConfigError)
    assert "remove federation.mode" in str(refused.exception)
