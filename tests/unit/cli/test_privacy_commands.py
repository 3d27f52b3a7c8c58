"""``fedllm audit`` and ``fedllm budget`` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from dp_accounting import get_epsilon_gaussian
from typer.testing import CliRunner

from fedllm.cli.app import app
from fedllm.errors import FedllmError
from fedllm.privacy.accounting import epsilon
from fedllm.privacy.ledger import Ledger

RECIPE = [
    "demo/smoke",
    "privacy.enabled=true",
    "privacy.epsilon=4",
    "privacy.delta=1e-4",
    "adapter.layers=0",
    "train.threads=1",
]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def said(done: Result) -> str:
    """Return what was printed, however wide the terminal was: wrapped lines are joined."""
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private") / "run"
    done = invoke("run", *RECIPE, f"run.dir={folder}", "--engine", "process")
    assert done.exit_code == 0, done.output
    return folder


def test_a_run_is_audited_and_its_report_says_so(run: Path) -> None:
    done = invoke("audit", str(run), "--static", "--mechanism", "--mia", "--trials", "300", "--records", "20")
    assert done.exit_code == 0, done.output
    for name in ("sampler", "ledger of site-0", "mechanism", "membership"):
        assert name in said(done)
    kept = json.loads((run / "audit.json").read_text())
    assert [audit["kind"] for audit in kept] == ["static", "mechanism", "mia"]
    assert all(verdict != "fail" for audit in kept for _, verdict, _ in audit["lines"])
    page = (run / "report.html").read_text()
    assert "Epsilon by accountant and by audit" in page
    assert "one full step, Gaussian trade-off" in page


def test_an_altered_ledger_fails_the_audit(run: Path, tmp_path: Path) -> None:
    ledger = run / "sites" / "site-0" / "ledger.sqlite"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole.replace(b'"steps": 4', b'"steps": 1'))
    try:
        done = invoke("audit", str(run), "--static")
        assert done.exit_code == 1
        assert "ledger is damaged" in said(done)
        broken = invoke("budget", "verify", str(run))
        assert isinstance(broken.exception, FedllmError)
    finally:
        ledger.write_bytes(whole)


def test_a_recipe_is_audited_without_a_run_and_an_open_one_is_refused() -> None:
    done = invoke("audit", *RECIPE, "--inversion")
    assert done.exit_code == 0, done.output
    assert "candidate matching" in said(done)
    refused = invoke("audit", "demo/smoke")
    assert "there is nothing private to audit" in str(refused.exception)
    assert "needs a finished run's folder" in str(invoke("audit", *RECIPE, "--mia").exception)


def test_budget_shows_plans_and_verifies(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "spent.png"
    shown = invoke("budget", "show", str(run), "--picture", str(picture))
    assert shown.exit_code == 0, shown.output
    assert "of epsilon 4 at delta 0.0001; add-or-remove-one" in said(shown)
    assert picture.read_bytes().startswith(b"\x89PNG")
    ledgers = [Ledger(run / "sites" / f"site-{index}" / "ledger.sqlite") for index in range(2)]
    spends = [entry.spend for ledger in ledgers for entry in ledger.entries()]
    composed = epsilon(spends, delta=1e-4)
    alone = [epsilon([entry.spend for entry in ledger.entries()], delta=1e-4) for ledger in ledgers]
    assert max(alone) < composed < sum(alone)
    assert f"records at all 2 sites: epsilon {composed:.3f} at delta 0.0001" in said(shown)
    planned = invoke("budget", "plan", *RECIPE)
    assert planned.exit_code == 0, planned.output
    assert "2, 2 planned" in said(planned)
    assert f"{composed:.3f} for a unit with records at all 2 sites" in said(planned)
    head = Ledger(run / "sites" / "site-0" / "ledger.sqlite").head
    assert head in invoke("budget", "verify", str(run)).output
    wrong = invoke("budget", "verify", str(run), "--head", "0" * 63 + "1")
    assert "lost, rolled back or replaced" in str(wrong.exception)
    assert "nothing has been spent" in str(invoke("budget", "show", str(tmp_path)).exception)
    assert "promises nothing" in str(invoke("budget", "plan", "demo/smoke").exception)
    counted = invoke("budget", "plan", *RECIPE, "evaluation.noise_multiplier=4")
    assert "counts over private held-out records spend 0.773" in said(counted)


def test_budget_of_a_real_site(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'site = "north"\ndata_path = "records.csv"\nmax_epsilon = 4.0\nmax_delta = 1e-4\n'
    )
    rows = ["text,label", *[f"record {i},{'ab'[i % 2]}" for i in range(400)]]
    (tmp_path / "records.csv").write_text("\n".join(rows) + "\n")
    words = [*RECIPE, "data.source=file", "--policy", str(tmp_path / "site.toml")]
    planned = invoke("budget", "plan", *words)
    assert planned.exit_code == 0, planned.output
    assert "north" in said(planned)
    assert "2, 2 planned" in said(planned)
    # a plan leaves nothing that another user than the SuperNode's would own
    assert not (tmp_path / "state").exists()
    Ledger(tmp_path / "state" / "ledger.sqlite")
    shown = invoke("budget", "show", str(tmp_path / "site.toml"))
    assert "north: nothing spent of epsilon 4 at delta 0.0001" in said(shown)
    over = invoke("budget", "plan", *[word.replace("epsilon=4", "epsilon=5") for word in words])
    assert "exceeds its policy's 4" in str(over.exception)


def test_a_real_site_audits_a_recipe_with_its_own_records(tmp_path: Path) -> None:
    policy = tmp_path / "site.toml"
    lines = 'site = "north"\ndata_path = "records.csv"\nmax_epsilon = 4.0\nmax_delta = 1e-4\n'
    policy.write_text(lines + "public_units = 350\n")
    rows = ["text,label", *[f"record {i},{'ab'[i % 2]}" for i in range(400)]]
    (tmp_path / "records.csv").write_text("\n".join(rows) + "\n")
    words = [*RECIPE, "data.source=file", "data.labels=a | b"]
    alone = invoke("audit", *words, "--static")
    assert "audit there, with --policy SITE.toml" in str(alone.exception)
    words += ["--policy", str(policy)]
    done = invoke("audit", *words, "--static", "--mechanism", "--trials", "300")
    assert done.exit_code == 0, done.output
    # the public number, not the true one
    assert "below 1/n at north (n >= 350)" in said(done)
    assert "goes with --static and --mechanism, not with --mia" in str(
        invoke("audit", *words, "--mia").exception
    )
    policy.write_text(lines.replace("4.0", "1.0"))
    assert "exceeds its policy's 1" in str(invoke("audit", *words, "--static").exception)


def test_whole_sites_are_audited_alone() -> None:
    sites = [word for word in RECIPE if not word.startswith("privacy.")]
    sites += ["site_privacy.enabled=true", "site_privacy.noise_multiplier=2"]
    done = invoke("audit", *sites, "--trials", "500")
    assert done.exit_code == 0, done.output
    assert "one round of whole sites" in said(done)
    done = invoke("audit", *sites, "--run", "--canaries", "50")
    assert done.exit_code == 0, done.output
    assert "whole sites: " in said(done)


@pytest.mark.parametrize("command", [["check"], ["budget", "plan"]])
@pytest.mark.parametrize("private", [True, False])
def test_whole_sites_are_stated_before_anything_runs(command: list[str], private: bool) -> None:
    words = [*RECIPE] if private else [word for word in RECIPE if not word.startswith("privacy.")]
    words += ["site_privacy.enabled=true", "site_privacy.noise_multiplier=2", "federation.quorum=2"]
    done = invoke(*command, *words, "site_privacy.noise_at=sites")
    assert done.exit_code == 0, done.output
    rounds = 2
    outsiders, share = (f"epsilon {get_epsilon_gaussian(z / rounds**0.5, 1e-5):.2f}" for z in (2, 2**0.5))
    assert "noise multiplier 2.000" in said(done)
    assert f"Towards whoever gets the adapter alone {outsiders}" in said(done)
    assert f"Towards another site of the run {share} (it knows its own share" in said(done)
    assert f"Towards the coordinator {share} (it sees each site's update apart" in said(done)
    assert "delta 1e-05, over all 2 rounds" in said(done)
    assert ("delta=0.0001" in said(done) or "epsilon by PLD" in said(done)) is private
    done = invoke(*command, *words)
    assert f"Towards another site of the run {outsiders}" in said(done)
    assert "Towards the coordinator no promise" in said(done)
    refused = invoke(*command, *words, "site_privacy.noise_at=sites", "wire.codec=int8")
    assert "use float32" in str(refused.exception)
