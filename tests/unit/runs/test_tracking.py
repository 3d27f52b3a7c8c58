"""What trackers get. TensorBoard and MLflow are the real ones; Weights & Biases is a stand-in."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedllm.config import Config, trackers
from fedllm.errors import ConfigError
from fedllm.runs import tracking
from fedllm.runs.events import append_event, read_events
from fedllm.runs.folder import RunFolder
from fedllm.runs.metrics import round_metrics
from fedllm.runs.shown import final_values, shown_settings, shown_values
from fedllm.runs.tracking import Tracked, Tracking, require_trackers
from fedllm.settings import PATHS, Scalar

MakeRun = Callable[..., RunFolder]
Reply = Callable[..., None]


@pytest.fixture(autouse=True)
def defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def settings(folder: RunFolder) -> Config:
    return Config.from_toml(folder.config_file)


def play(folder: RunFolder, reply: Reply, number: int, **values: object) -> None:
    """Add the events of one round of two sites; the second one's reply is set aside."""
    append_event(folder, "round_started", round=number, sites=["north", "south"])
    reply(folder, number, "north", **values)
    reply(folder, number, "south", accepted=False, reason="late", loss=None, accuracy=None, macro_f1=None)
    append_event(
        folder, "round_finished", round=number, accepted=1, bytes_up=200, bytes_down=400, seconds=3.0
    )


def warnings(folder: RunFolder) -> list[str]:
    return [event["text"] for event in read_events(folder) if event["event"] == "warning"]


def scalars(folder: RunFolder, tag: str) -> dict[int, float]:
    found = EventAccumulator(str(folder.path / "tracking" / "tensorboard"))
    found.Reload()
    return {event.step: event.value for event in found.Scalars(tag)}


def test_settings_are_all_but_those_that_name_this_machine(make_run: MakeRun) -> None:
    folder = make_run(data__path="/srv/secret.csv", model__path="/srv/base", adapter__basis="public-svd")
    shown = shown_settings(settings(folder))
    assert shown["adapter.basis"] == "public-svd"
    assert shown["train.lr"] == 0.01
    assert not set(shown) & set(PATHS)
    assert not any(str(value).startswith("/") for value in shown.values())
    named = {key for key in Config().to_flat() if key.endswith(("path", "dir", "resume", "init"))}
    assert named == set(PATHS)


def test_values_are_those_of_the_table_and_a_withheld_one_is_absent(make_run: MakeRun, reply: Reply) -> None:
    folder = make_run()
    play(folder, reply, 1, loss=None, epsilon=0.5)
    (metrics,) = round_metrics(read_events(folder))
    assert shown_values(metrics) == {
        "federation/accuracy": 0.5,
        "federation/macro_f1": 0.25,
        "federation/accepted": 1.0,
        "federation/epsilon": 0.5,
        "federation/bytes_up": 200.0,
        "federation/bytes_down": 400.0,
        "federation/seconds": 3.0,
        "accuracy/north": 0.5,
        "macro_f1/north": 0.25,
        "accepted/north": 1.0,
        "epsilon/north": 0.5,
        "bytes_up/north": 100.0,
        "bytes_down/north": 200.0,
        "seconds/north": 2.0,
        "accepted/south": 0.0,
        "bytes_up/south": 100.0,
        "bytes_down/south": 200.0,
        "seconds/south": 2.0,
    }


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a/b", "a_b"), ("..", "_"), ("St. Anna 2", "St. Anna 2"), ("Zürich", "Zürich"), ("x%{}", "x___")],
)
def test_a_sites_name_is_one_part_of_a_metrics_name(
    make_run: MakeRun, reply: Reply, name: str, shown: str
) -> None:
    folder = make_run()
    reply(folder, 1, name)
    (metrics,) = round_metrics(read_events(folder))
    assert shown_values(metrics)[f"loss/{shown}"] == 1.0


def test_tensorboard_reads_back_and_a_resume_replaces_what_it_repeats(
    make_run: MakeRun, reply: Reply
) -> None:
    folder = make_run(run__tracking="tensorboard", data__path="/srv/secret.csv", train__lr=0.25)
    config = settings(folder)
    first = Tracking(folder)
    first.open(config, run_id="abc", next_round=1)
    for number, loss in ((1, 3.0), (2, 2.0), (3, 9.0)):
        play(folder, reply, number, loss=loss)
        first.round(number)
    first.close(finished=False)
    assert scalars(folder, "loss/north") == {1: 3.0, 2: 2.0, 3: 9.0}
    second = Tracking(folder)
    second.open(config, run_id="abc", next_round=3)
    play(folder, reply, 3, loss=1.5)
    second.round(3)
    second.close(finished=True)
    assert scalars(folder, "loss/north") == {1: 3.0, 2: 2.0, 3: 1.5}
    assert scalars(folder, "federation/bytes_up") == {1: 200.0, 2: 200.0, 3: 200.0}
    found = EventAccumulator(str(folder.path / "tracking" / "tensorboard"))
    found.Reload()
    (text,) = {event.tensor_proto.string_val[0].decode() for event in found.Tensors("settings/text_summary")}
    assert "| train.lr | 0.25 |" in text
    assert "secret" not in text
    assert str(folder.path) not in text
    assert warnings(folder) == []


def mlflow_runs(uri: str, experiment: str) -> list[Any]:
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id]))


def test_mlflow_reads_back_and_a_resume_goes_on_with_the_same_run(make_run: MakeRun, reply: Reply) -> None:
    folder = make_run(run__tracking="mlflow", data__path="/srv/secret.csv", data__instruction="long " * 1500)
    config, uri = settings(folder), f"sqlite:///{folder.path}/tracking/mlflow/mlflow.db"
    first = Tracking(folder)
    first.open(config, run_id="abc", next_round=1)
    play(folder, reply, 1, loss=3.0)
    first.round(1)
    first.close(finished=False)
    (run,) = mlflow_runs(uri, "fedllm")
    assert run.info.status == "FAILED"
    second = Tracking(folder)
    second.open(config, run_id="abc", next_round=2)
    (run,) = mlflow_runs(uri, "fedllm")
    assert run.info.status == "RUNNING"
    play(folder, reply, 2, loss=2.0)
    second.round(2)
    second.close(finished=True)
    (run,) = mlflow_runs(uri, "fedllm")
    assert (run.info.status, run.info.run_name) == ("FINISHED", folder.path.name)
    assert run.data.metrics["federation/bytes_up"] == 200.0
    assert run.data.tags == {"fedllm.run": "abc", "mlflow.runName": folder.path.name}
    shown = shown_settings(config)
    assert set(run.data.params) == set(shown)
    assert run.data.params["train.lr"] == "0.01"
    assert len(run.data.params["data.instruction"]) == 6000
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, "loss/north")
    assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.0)]
    assert warnings(folder) == []


def test_mlflow_goes_where_its_own_variables_say(
    make_run: MakeRun, reply: Reply, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/shared.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "wards")
    monkeypatch.chdir(tmp_path)
    for run_id in ("abc", "def"):
        folder = make_run(run_id, run__tracking="mlflow")
        shown = Tracking(folder)
        shown.open(settings(folder), run_id=run_id, next_round=1)
        play(folder, reply, 1)
        shown.round(1)
        shown.close(finished=True)
        assert warnings(folder) == []
        assert not (folder.path / "tracking" / "mlflow" / "mlflow.db").exists()
    assert {run.info.run_name for run in mlflow_runs(uri, "wards")} == {"abc", "def"}


def evaluate(folder: RunFolder, stage: str, site: str, **scores: float | None) -> None:
    nothing = dict.fromkeys(("loss", "accuracy", "macro_f1", "majority_accuracy", "majority_macro_f1"))
    append_event(folder, "evaluated", stage=stage, site=site, records=4, **(nothing | scores))


def test_the_final_evaluation_is_shown_beside_the_last_round(make_run: MakeRun, reply: Reply) -> None:
    folder = make_run(run__tracking="tensorboard,mlflow", evaluation__every=0)
    shown = Tracking(folder)
    shown.open(settings(folder), run_id="abc", next_round=1)
    for number in (1, 2):
        play(folder, reply, number, loss=None, accuracy=None, macro_f1=None)
        shown.round(number)
    for site, accuracy in (("north", 0.5), ("south", 0.75)):
        evaluate(folder, "base", site, accuracy=0.25)
        evaluate(folder, "final", site, accuracy=accuracy)
    shown.final(2)
    shown.close(finished=True)
    assert scalars(folder, "final/accuracy") == {2: 0.625}
    assert scalars(folder, "base/accuracy") == {2: 0.25}
    (run,) = mlflow_runs(f"sqlite:///{folder.path}/tracking/mlflow/mlflow.db", "fedllm")
    assert {name for name in run.data.metrics if "accuracy" in name} == {"final/accuracy", "base/accuracy"}
    assert warnings(folder) == []


def test_a_final_evaluation_that_was_withheld_is_absent(make_run: MakeRun) -> None:
    folder = make_run()
    evaluate(folder, "final", "north")
    assert final_values(read_events(folder)) == {}


class FakeRun:
    """What wandb.init returns, as far as it is used."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.config = SimpleNamespace(update=self.note("config.update"))
        self.define_metric = self.note("define_metric")
        self.log = self.note("log")
        self.finish = self.note("finish")

    def note(self, name: str) -> Callable[..., None]:
        return lambda *words, **named: self.calls.append((name, words, named))


def test_wandb_is_offline_and_told_nothing_of_the_machine(
    make_run: MakeRun, reply: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Mapping[str, Any]] = []
    fake = FakeRun()

    def init(**named: Any) -> FakeRun:
        started.append(named)
        return fake

    module = SimpleNamespace(init=init, Settings=lambda **named: named)
    monkeypatch.setitem(sys.modules, "wandb", module)
    folder = make_run(run__tracking="wandb", data__path="/srv/secret.csv")
    config, place = settings(folder), folder.path / "tracking" / "wandb"
    shown = Tracking(folder)
    shown.open(config, run_id="abc", next_round=1)
    assert place.is_dir(), "wandb writes to a temporary folder where its own is not there"
    play(folder, reply, 1, loss=0.5)
    shown.round(1)
    shown.close(finished=True)
    shown.close(finished=False)
    (named,) = started
    assert named == {
        "project": "fedllm",
        "dir": str(place),
        "name": folder.path.name,
        "id": "abc",
        "resume": "allow",
        "mode": "offline",
        "settings": {
            "console": "off",
            "disable_code": True,
            "disable_git": True,
            "silent": True,
            "x_disable_machine_info": True,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
        },
    }
    (metrics,) = round_metrics(read_events(folder))
    assert fake.calls == [
        ("define_metric", ("*",), {"step_metric": "round"}),
        ("config.update", (shown_settings(config),), {"allow_val_change": True}),
        ("log", ({"round": 1, **shown_values(metrics)},), {}),
        ("finish", (), {"exit_code": 0}),
    ]
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "wards")
    again = Tracking(folder)
    again.open(config, run_id="abc", next_round=2)
    again.close(finished=False)
    assert (started[1]["mode"], started[1]["project"], started[1]["id"]) == ("online", "wards", "abc")
    assert fake.calls[-1] == ("finish", (), {"exit_code": 1})
    assert warnings(folder) == []


class Failing:
    """A tracker whose server goes away."""

    def __init__(self, run: Tracked) -> None:
        self.rounds: list[int] = []

    def settings(self, values: Mapping[str, Scalar]) -> None:
        pass

    def round(self, number: int, values: Mapping[str, float]) -> None:
        self.rounds.append(number)
        if number == 2:
            raise ConnectionError("https://user:password@tracker.example is away")

    def close(self, *, finished: bool) -> None:
        raise OSError(28, "No space left on device")


def test_a_tracker_that_fails_is_a_warning_and_the_others_go_on(
    make_run: MakeRun, reply: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Failing] = []
    monkeypatch.setitem(tracking.BACKENDS, "mlflow", lambda run: made.append(Failing(run)) or made[-1])
    folder = make_run(run__tracking="mlflow,tensorboard")
    shown = Tracking(folder)
    shown.open(settings(folder), run_id="abc", next_round=1)
    for number in (1, 2, 3):
        play(folder, reply, number, loss=float(number))
        shown.round(number)
    shown.close(finished=True)
    assert made[0].rounds == [1, 2]
    (text,) = warnings(folder)
    assert text.startswith("run.tracking: mlflow failed (ConnectionError) and gets nothing more")
    assert "password" not in folder.events_file.read_text()
    assert scalars(folder, "loss/north") == {1: 1.0, 2: 2.0, 3: 3.0}
    other = make_run("other", run__tracking="mlflow")
    late = Tracking(other)
    late.open(settings(other), run_id="abc", next_round=1)
    late.close(finished=True)
    assert "mlflow failed (No space left on device)" in warnings(other)[0]


def test_trackers_that_cannot_begin_are_warnings_too(
    make_run: MakeRun, reply: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(run__tracking="tensorboard,mlflow")
    (folder.path / "tracking").write_text("a file where a folder should be")
    shown = Tracking(folder)
    shown.open(settings(folder), run_id="abc", next_round=1)
    play(folder, reply, 1)
    shown.round(1)
    shown.close(finished=True)
    first, second = warnings(folder)
    assert "tensorboard failed (Not a directory)" in first
    assert "mlflow failed (Not a directory)" in second


def test_a_package_that_is_missing_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    present = importlib.util.find_spec("tensorboard")
    monkeypatch.setattr(tracking, "find_spec", lambda name: present if name == "tensorboard" else None)
    require_trackers(Config.from_flat({"run.tracking": "tensorboard"}))
    with pytest.raises(ConfigError, match="`pip install wandb`"):
        require_trackers(Config.from_flat({"run.tracking": "tensorboard, wandb"}))


def test_mlflow_needs_what_writes_its_database_unless_a_server_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlflow-skinny alone imports, and then keeps nothing in a database."""
    config = Config.from_flat({"run.tracking": "mlflow"})
    found = importlib.util.find_spec("mlflow")
    monkeypatch.setattr(tracking, "find_spec", lambda name: found if name == "mlflow" else None)
    for store in ("", "sqlite:////srv/mlflow.db", "mysql+pymysql://user@host/runs"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        with pytest.raises(
            ConfigError, match="sqlalchemy and alembic are not .* `pip install sqlalchemy alem"
        ):
            require_trackers(config)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    require_trackers(config)


def test_the_setting_names_trackers_once() -> None:
    found = trackers(Config.from_flat({"run.tracking": " mlflow,none,, tensorboard,mlflow"}))
    assert found == ("mlflow", "tensorboard")
    assert trackers(Config()) == ()
    with pytest.raises(ConfigError, match="run.tracking: 'tensorbord' is not one of none, tensorboard"):
        Config.from_flat({"run.tracking": "tensorbord"})
