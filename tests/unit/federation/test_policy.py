"""What a site's own policy decides, and what leaves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.config import Config
from fedllm.errors import BudgetError, FedllmError, PrivacyError
from fedllm.federation import client as client_module
from fedllm.federation.inprocess import reply_with
from fedllm.federation.site import identify, public_reason, real_site
from fedllm.privacy.accounting import require_delta
from fedllm.privacy.plan import basis_plan
from fedllm.privacy.policy import SitePolicy


def test_a_real_site_needs_a_policy_and_reads_only_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedllm.federation.site.in_simulation", lambda: False)

    def context(**node: str) -> Context:
        return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={})  # type: ignore[arg-type]

    config = Config.from_flat({"privacy.enabled": True, "privacy.epsilon": 2.0})
    with pytest.raises(BudgetError, match="names no site policy"):
        identify(context(), config, 0)
    policy = tmp_path / "site.toml"
    policy.write_text('site = "north"\ndata_path = "own.csv"\ntext = "note"\nmax_epsilon = 3.0\n')
    site = identify(context(policy=str(policy)), config, 0)
    assert not site.simulated
    assert site.config.data.source == "file"
    assert site.config.data.text == "note"
    assert site.policy.data_path == str(tmp_path / "own.csv")
    assert not site.metrics_may_leave
    sent = config.replace(data__source="file", data__path="/etc/passwd")
    with pytest.raises(BudgetError, match="the server sent a file path"):
        identify(context(policy=str(policy)), sent, 0)
    with pytest.raises(BudgetError, match="requires privacy.enabled=true"):
        identify(context(policy=str(policy)), Config(), 0)
    with pytest.raises(BudgetError, match="epsilon=5 exceeds its policy's 3"):
        identify(context(policy=str(policy)), config.replace(privacy__epsilon=5.0), 0)
    for name in ("/srv/model", "../model", "a/b/c"):
        with pytest.raises(BudgetError, match="model.name that is no model's name"):
            identify(context(policy=str(policy)), config.replace(model__name=name), 0)


@pytest.mark.parametrize("role", ["pair", "rejected", "unit"])
def test_a_real_site_reads_the_columns_of_its_policy_alone(tmp_path: Path, role: str) -> None:
    policy = tmp_path / "site.toml"
    policy.write_text('site = "north"\ndata_path = "own.csv"\nlabel = "code"\n')
    config = Config.from_flat({"privacy.enabled": True, "privacy.epsilon": 2.0, "data.text": "name"})
    found = real_site(policy, config).config.data
    assert (found.text, found.label, found.unit) == ("text", "code", "")
    asked = replace(config, data=replace(config.data, **{role: "hiv_status"}))
    with pytest.raises(BudgetError, match=f"asks for data.{role}, and its policy names no column"):
        real_site(policy, asked)
    policy.write_text(policy.read_text() + f'{role} = "own"\n')
    assert vars(real_site(policy, asked).config.data)[role] == "own"
    # the unit is the site's own promise, whatever is asked
    assert vars(real_site(policy, config).config.data)[role] == ("own" if role == "unit" else "")


def test_a_policy_insists_on_its_share_of_noise() -> None:
    policy = SitePolicy(site="north", min_site_noise=1.5)
    policy.require_site_noise(1.5)
    with pytest.raises(BudgetError, match="a share of noise of 1.5 at least .* comes to 0 "):
        policy.require_site_noise(0.0)


@pytest.fixture
def noisy_policy(tmp_path: Path) -> Path:
    policy = tmp_path / "site.toml"
    policy.write_text(
        'site = "north"\ndata_path = "own.csv"\nmin_site_noise = 1.0\nrequire_privacy = false\n'
    )
    return policy


def test_a_policy_that_wants_site_noise_answers_no_message_of_another_run(noisy_policy: Path) -> None:
    with pytest.raises(BudgetError, match="wants a share of noise of 1"):
        real_site(noisy_policy, Config.from_flat({"model.name": "tiny-llama"}))


@pytest.mark.parametrize("basis", ["gradient", "dp-gradient"])
def test_a_policy_that_wants_site_noise_makes_no_basis_of_its_records(basis: str, noisy_policy: Path) -> None:
    config = Config.from_flat({"model.name": "tiny-llama"})
    hidden = replace(config.site_privacy, enabled=True, noise_at="sites")
    asked = replace(config, adapter=replace(config.adapter, basis=basis), site_privacy=hidden)
    with pytest.raises(BudgetError, match="wants a share of noise of 1"):
        client_module._make_basis(real_site(noisy_policy, asked), {}, {})


def test_a_site_refuses_what_its_noise_would_not_hide(tmp_path: Path) -> None:
    asked = {
        "model.name": "tiny-llama",
        "run.dir": str(tmp_path),
        "adapter.method": "lora",
        "strategy.name": "fedsa",
        "site_privacy.enabled": True,
        "site_privacy.noise_at": "sites",
        "site_privacy.noise_multiplier": 2.0,
    }
    # as a coordinator would that does not check its own recipe
    notes, _ = reply_with(Config.from_flat(asked), {"weights": "0"})
    assert "keeps matrices at the sites" in str(notes["error"])
    assert "weights" not in notes


def test_a_withheld_reply_carries_no_update_and_still_says_what_was_booked(tmp_path: Path) -> None:
    private = Config.from_flat(
        {
            "run.dir": str(tmp_path),
            "model.name": "tiny-llama",
            "privacy.enabled": True,
            "privacy.epsilon": 4.0,
        }
    )
    notes, parts = reply_with(private, {"train_loss": 1.0, "epsilon": 0.5, "ledger": "0a"}, {"adapter": b"x"})
    assert set(notes) == {"error", "site", "epsilon", "ledger"}
    assert parts == {}
    assert reply_with(private, {"epsilon": 0.5}, {"adapter": b"x"})[1] == {"adapter": b"x"}


@pytest.mark.parametrize("noise", ["gaussian", "discrete-gaussian"])
def test_a_private_basis_takes_the_noise_of_the_recipe(noise: str) -> None:
    config = Config.from_flat({"privacy.noise": noise, "privacy.delta": 1e-4, "adapter.basis_records": 8})
    assert basis_plan(config, units=100, site="north").discrete == (noise != "gaussian")


def test_a_site_remembers_private_runs_apart_from_open_ones(tmp_path: Path) -> None:
    policy = tmp_path / "site.toml"
    policy.write_text('site = "north"\ndata_path = "own.csv"\nrequire_privacy = false\n')
    config = Config.from_flat({"model.name": "tiny-llama"})
    private = replace(config, privacy=replace(config.privacy, enabled=True))
    spec = AdapterSpec(method="lora", rank=2, scale=1.0, shapes={"layer": (3, 4)}, basis="none", base="x")
    state = AdapterState(spec, {})
    sides = [real_site(policy, asked).memory("0a") for asked in (config, private)]
    for value, memory in enumerate(sides):
        memory.save("residual", 1, state.with_tensors({"layer.A": np.full((2, 4), value)}))
    kept = [memory.load("residual", spec, round=1) for memory in sides]
    assert [float(one.tensors["layer.A"].max()) for one in kept if one] == [0.0, 1.0]


def test_reasons_for_the_server_carry_no_folders() -> None:
    error = FedllmError("/home/clinic/data/own.csv: no column 'note' (data.text); it has a/b.")
    assert public_reason(None, error) == "own.csv: no column 'note' (data.text); it has a/b."
    with pytest.raises(PrivacyError) as caught:
        require_delta(1e-3, records=1234, site="north")
    assert public_reason(None, caught.value).startswith("site north: privacy.delta is too large")
    with pytest.raises(PrivacyError) as caught:
        SitePolicy(site="north").require_noise(0.2345)
    assert "0.2" not in public_reason(None, caught.value)
