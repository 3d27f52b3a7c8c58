"""A run's rounds, as they end, and its final evaluation in TensorBoard, MLflow or Weights & Biases.

Trackers get what ``metrics.csv`` holds, the settings, and the means over sites of the final evaluation,
nothing more. The run's own files stay the source: a tracker that fails is left out, and the run goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from fedllm.config import Config, trackers
from fedllm.errors import ConfigError, RunError
from fedllm.runs.events import append_event, read_events
from fedllm.runs.folder import RunFolder
from fedllm.runs.metrics import round_metrics
from fedllm.runs.shown import final_values, shown_settings, shown_values
from fedllm.settings import Scalar

PROJECT = "fedllm"
#: Most parameters, and most metrics, in one of MLflow's requests, and most characters of a parameter.
MLFLOW_PARAMS, MLFLOW_METRICS, MLFLOW_TEXT = 100, 1000, 6000
#: How the address of a database begins; a server's address needs no driver here.
MLFLOW_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
#: No calls home, no lines between a run's own, and a server that is away holds a round up for seconds: by
#: itself the client would try for minutes.
MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """The run as a tracker sees it.

    Attributes
    ----------
    place : Path
        Folder of this tracker alone, under the run folder; it exists.
    name : str
        What people call the run: its folder's name.
    id : str
        The same after a resume.
    next_round : int
        The round that comes next, from 1.
    """

    place: Path
    name: str
    id: str
    next_round: int


class Tracker(Protocol):
    """Where a run is shown beside its own files; whatever it raises leaves it out for the rest of the run."""

    def settings(self, values: Mapping[str, Scalar]) -> None:
        """Write the settings; after a resume they are the same ones again."""

    def round(self, number: int, values: Mapping[str, float]) -> None:
        """Write values as of the end of a round; the final evaluation's are of the last one."""

    def close(self, *, finished: bool) -> None:
        """Write out what is left; the run is finished, or has stopped and may be resumed."""


class TensorBoard:
    """Event files in the run folder; a resume adds a file that replaces the rounds it repeats."""

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        again = run.next_round if run.next_round > 1 else None
        self._writer = SummaryWriter(str(run.place), purge_step=again)

    def settings(self, values: Mapping[str, Scalar]) -> None:
        """Write a table."""
        rows = "".join(f"| {key} | {value} |\n" for key, value in values.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)

    def round(self, number: int, values: Mapping[str, float]) -> None:
        """Write one scalar a name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        """Close the file."""
        self._writer.close()


class MLflow:
    """A run in the store of ``MLFLOW_TRACKING_URI``, else in a database in the run folder."""

    def __init__(self, run: Tracked) -> None:
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        given = os.environ.get("MLFLOW_TRACKING_URI", "")
        # the client alone adds no user, host name or path of the program, as mlflow.start_run would
        self._client = MlflowClient(tracking_uri=given or f"sqlite:///{run.place / 'mlflow.db'}")
        files = None if given else (run.place / "artifacts").as_uri()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        place = (
            experiment.experiment_id
            if experiment is not None
            else self._client.create_experiment(name, artifact_location=files)
        )
        tag = "fedllm.run"
        found = self._client.search_runs([place], filter_string=f"tags.`{tag}` = '{run.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(place, run_name=run.name, tags={tag: run.id}).info.run_id

    def settings(self, values: Mapping[str, Scalar]) -> None:
        """Write them as parameters."""
        from mlflow.entities import Param

        params = [Param(key, str(value)[:MLFLOW_TEXT]) for key, value in values.items()]
        for start in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_PARAMS])

    def round(self, number: int, values: Mapping[str, float]) -> None:
        """Write metrics whose step is the round."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, number) for name, value in values.items()]
        for start in range(0, len(metrics), MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MLFLOW_METRICS])

    def close(self, *, finished: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "FAILED")


class WeightsAndBiases:
    """A run of Weights & Biases, kept offline in the run folder unless ``WANDB_MODE`` says otherwise."""

    def __init__(self, run: Tracked) -> None:
        # read when the package is imported: no reports of its own crashes
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(run.place),
            name=run.name,
            id=run.id,
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            # it would add the host's name, the program and its output, packages, commit and load
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                silent=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        # its own steps may not be repeated, as a resume repeats a round
        self._run.define_metric("*", step_metric="round")

    def settings(self, values: Mapping[str, Scalar]) -> None:
        """Write them as the run's config."""
        self._run.config.update(dict(values), allow_val_change=True)

    def round(self, number: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        self._run.log({"round": number, **values})

    def close(self, *, finished: bool) -> None:
        """Write out what is left."""
        self._run.finish(exit_code=0 if finished else 1)


#: A name in ``run.tracking`` -> its class; the name is also that of the package.
BACKENDS: Mapping[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


class Tracking:
    """The trackers of one run; none until it is opened."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._open: dict[str, Tracker] = {}

    def open(self, config: Config, *, run_id: str, next_round: int) -> None:
        """Open what ``run.tracking`` names and write the settings to it."""
        settings = shown_settings(config)
        for name in trackers(config):
            with self._guarded(name):
                place = self._folder.path / "tracking" / name
                place.mkdir(parents=True, exist_ok=True)
                self._open[name] = BACKENDS[name](
                    Tracked(place=place, name=self._folder.path.name, id=run_id, next_round=next_round)
                )
                self._open[name].settings(settings)

    def round(self, number: int) -> None:
        """Write a finished round, as the run's events have it."""
        if not self._open:
            return
        for metrics in round_metrics(read_events(self._folder)):
            if metrics.round == number:
                self._write(number, shown_values(metrics))

    def final(self, number: int) -> None:
        """Write the final evaluation, as the run's events have it, beside the last round."""
        if self._open and (values := final_values(read_events(self._folder))):
            self._write(number, values)

    def _write(self, number: int, values: Mapping[str, float]) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.round(number, values)

    def close(self, *, finished: bool) -> None:
        """Close all trackers; nothing happens the second time."""
        for name in list(self._open):
            with self._guarded(name):
                self._open.pop(name).close(finished=finished)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Turn whatever another project's client raises into a warning, and use it no more."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            # the text of an error may hold an address with a password
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            # a disk that is full fails the run's own files next, which say so
            with suppress(RunError):
                append_event(
                    self._folder,
                    "warning",
                    text=f"run.tracking: {name} failed ({reason}) and gets nothing more unless the run is "
                    "resumed; metrics.csv has every round",
                )


def require_trackers(config: Config) -> None:
    """Refuse trackers that are not installed, or lack a package that they write with.

    Raises
    ------
    ConfigError
        With the command that installs what the first one lacks.
    """
    for name in trackers(config):
        missing = [package for package in _packages(name) if find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"run.tracking: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed "
                f"where the coordinator runs; `pip install {' '.join(missing)}`, or leave {name} out."
            )


def _packages(name: str) -> tuple[str, ...]:
    """Return what a tracker needs; mlflow-skinny comes without what writes to a database."""
    if name != "mlflow":
        return (name,)
    store = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:"
    return (name, "sqlalchemy", "alembic") if store.startswith(MLFLOW_DATABASES) else (name,)
