"""The baselines that train: each site alone, and the pooled records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedllm.adapters.export import load_state
from fedllm.cli.comparison import read_comparison
from fedllm.cli.jobs import plan
from fedllm.cli.tables import final_table
from fedllm.config import Config, read_toml
from fedllm.data.sites import SiteData, simulated_site
from fedllm.errors import DataError
from fedllm.federation.estimate import estimate_bytes
from fedllm.federation.inprocess import run_values
from fedllm.federation.plan import as_run
from fedllm.federation.site import Site, training_config
from fedllm.runs.events import read_events
from fedllm.runs.folder import RunFolder, load_config
from fedllm.runs.manifest import config_digest, read_manifest
from fedllm.training.round import evaluate
from fedllm.training.session import open_session, tokenise
from fedllm.training.spec import basis_from_seed

SOME: dict[str, Any] = {"federation__sites": 4, "federation__sites_per_round": 2}
FEDIT = {"strategy__name": "fedit", "adapter__method": "lora"}
UNEQUAL = {**FEDIT, "adapter__site_ranks": "3,1,2", "adapter__alpha": 4.0}
SHORT: dict[str, Any] = {
    "model.name": "tiny-llama",
    "adapter.layers": "1",
    "data.source": "mcc",
    "federation.sites": 1,
    "federation.rounds": 1,
    "train.local_steps": 1,
    "train.batch_size": 2,
    "evaluation.records": 1,
    "evaluation.final_records": 1,
}
#: What a federation adds to training.
EXTRAS: dict[str, Any] = {
    "strategy__server_optimizer": "fedadam",
    "strategy__server_lr": 0.5,
    "wire__codec": "int4",
    "wire__codec_down": "topk:0.25+int8",
}


def matrices(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_state(folder)[0].tensors)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def test_sites_alone_train_in_every_round_however_many_a_federation_would_draw(
    federate: Any, events: Any
) -> None:
    few = federate(dir="few", federation__mode="local", **SOME)
    every = federate(dir="all", federation__mode="local", federation__sites=4)
    assert [len(event["sites"]) for event in events(few, "round_started")] == [4, 4]
    for site in (f"site-{number}" for number in range(4)):
        left, right = (matrices(folder.site_dir(site) / "adapter") for folder in (few, every))
        assert same(left, right)
        assert all(value.any() for value in left.values())


def test_a_sites_own_adapter_is_judged_on_the_records_of_the_others_too(federate: Any, events: Any) -> None:
    folder = federate(dir="alone", federation__mode="local", evaluation__final_records=5, train__lr=0.1)
    found = {event["site"]: event for event in events(folder, "evaluated") if event["stage"] == "elsewhere"}
    config = load_config(folder)
    shares = [simulated_site(config.data, sites=3, seed=config.run.seed, index=index) for index in range(3)]
    for index, name in enumerate(site.name for site in shares):
        state = load_state(folder.site_dir(name) / "adapter")[0]
        session = open_session(config, state.spec, basis_from_seed(state.spec))
        # 5 records of two sites: 3 of each
        others = [one for other in shares if other.name != name for one in other.heldout[:3]]
        tokens = tokenise(replace(shares[index], heldout=tuple(others)), config)
        scores = evaluate(session, tokens, config=config, state=state, records=0)
        assert scores is not None
        assert found[name]["records"] == 6
        assert found[name]["loss"] == pytest.approx(scores.loss)
        assert found[name]["accuracy"] == pytest.approx(scores.accuracy)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(final_table([("alone", read_events(folder))]))
    assert "at other sites" in capture.get()
    assert "On the records of the other sites a site" in folder.report_file.read_text()
    together = federate(dir="together")
    assert {event["stage"] for event in events(together, "evaluated")} == {"base", "final"}


def test_other_sites_records_that_cannot_be_read_are_no_reason_to_fail(
    federate: Any, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Site) -> SiteData:
        raise DataError("an answer does not fit")

    monkeypatch.setattr(Site, "elsewhere", broken)
    folder = federate(federation__mode="local")
    assert {event["stage"] for event in events(folder, "evaluated")} == {"base", "final"}


def test_a_private_site_tells_of_other_sites_records_only_where_those_are_public(
    federate: Any, events: Any
) -> None:
    private = {"privacy__enabled": True, "privacy__epsilon": 6.0, "privacy__delta": 1e-4}
    for public in (False, True):
        folder = federate(dir=str(public), federation__mode="local", **private, data__heldout_public=public)
        stages = {event["stage"] for event in events(folder, "evaluated") if event["loss"] is not None}
        assert stages == ({"base", "final", "elsewhere"} if public else set())


@pytest.mark.parametrize(("some", "steps"), [({}, 12), ({"federation.sites_per_round": 2}, 6)])
def test_pooled_records_get_the_steps_of_the_sites_that_a_round_asks(
    some: dict[str, Any], steps: int
) -> None:
    values = {"federation.mode": "central", "federation.sites": 4, "train.local_steps": 3}
    assert training_config(Config.from_flat(values | some)).train.local_steps == steps


def test_unequal_ranks_have_their_baselines_too(federate: Any, events: Any) -> None:
    alone = federate(dir="alone", federation__mode="local", **UNEQUAL)
    assert [event["accepted"] for event in events(alone, "round_finished")] == [3, 3]
    ranks = [load_state(alone.site_dir(f"site-{n}") / "adapter")[0].spec.rank for n in range(3)]
    assert ranks == [3, 1, 2]
    # the first site, which trains on the pooled records, has the smallest rank
    first = UNEQUAL | {"adapter__site_ranks": "1,2,3"}
    pooled = federate(dir="pooled", federation__mode="central", **first)
    plain = federate(dir="plain", federation__mode="central", **UNEQUAL | {"adapter__site_ranks": ""})
    assert same(matrices(pooled.adapter_dir), matrices(plain.adapter_dir))
    assert load_config(pooled).adapter.site_ranks == ""


@pytest.mark.parametrize("mode", ["local", "central"])
def test_baselines_have_no_server_optimiser_and_no_codec(mode: str, federate: Any) -> None:
    def adapter(folder: RunFolder) -> Path:
        return folder.adapter_dir if mode == "central" else folder.site_dir("site-1") / "adapter"

    plain = federate(dir="plain", federation__mode=mode)
    extra = federate(dir="extra", federation__mode=mode, **EXTRAS)
    assert same(matrices(adapter(extra)), matrices(adapter(plain)))
    # what the folder says is what was used
    settings = [load_config(folder) for folder in (plain, extra)]
    assert settings[0].replace(run__dir="") == settings[1].replace(run__dir="")
    manifest = read_manifest(extra)
    assert manifest is not None
    assert manifest["config_sha256"] == config_digest(settings[1])


def test_a_comparison_finds_its_baseline_finished(tmp_path: Path) -> None:
    recipe, file = tmp_path / "recipe.toml", tmp_path / "compare.toml"
    recipe.write_text(Config.from_flat(SHORT).replace(**EXTRAS).to_toml())
    head = f'recipe = "{recipe}"\nseeds = [1]\n'
    file.write_text(head + '[baselines]\ncentral = true\n[[cells]]\nname = "Fed-SB"\n')
    central = plan(read_comparison(file), file, tmp_path / "runs")[1]
    run_values({**read_toml(recipe), **central.changes}, sites=1)
    assert central.config.federation.mode == "central"
    assert central.state() == "finished"


def test_a_baselines_estimate_is_of_what_runs() -> None:
    values = {"model.name": "tiny-llama", "federation.mode": "central"}
    plain = Config.from_flat(values)
    extra = plain.replace(**EXTRAS)
    assert estimate_bytes(extra) == estimate_bytes(plain)
    assert as_run(extra) == plain
    federated = extra.replace(federation__mode="federated")
    assert as_run(federated) == federated
