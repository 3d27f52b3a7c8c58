"""The server of one run, whatever carries the messages."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from threadpoolctl import threadpool_limits

from fedllm.config import Config
from fedllm.errors import FedllmError, RunError
from fedllm.federation.cards import run_card
from fedllm.federation.plan import as_run, check_recipe
from fedllm.federation.run import ServerRun, announce, require_unfinished, resume_run, start_run
from fedllm.runs.events import append_event
from fedllm.runs.folder import RunFolder, create_run, load_config, locked, open_run
from fedllm.runs.manifest import write_manifest
from fedllm.runs.metrics import write_metrics
from fedllm.runs.report import write_report
from fedllm.runs.traffic import write_traffic
from fedllm.settings import Scalar


def serve(values: Mapping[str, Scalar], grid: Grid) -> RunFolder:
    """Run a recipe's rounds over a grid and leave a complete run folder.

    Parameters
    ----------
    values : Mapping[str, Scalar]
        Flat settings; with ``run.resume`` all others are those of the folder.
    grid : Grid
        Flower's grid, or the in-process one.

    Raises
    ------
    FedllmError
        If the run could not be started or finished; the folder says why and can be resumed.
    """
    # OpenBLAS's threads wait for ever when another thread of the process forks, as Ray's start does
    with threadpool_limits(limits=1, user_api="blas"):
        return _serve(Config.from_flat(values), grid)


def _serve(asked: Config, grid: Grid) -> RunFolder:
    if asked.run.resume:
        folder = open_run(asked.run.resume)
        with locked(folder):
            require_unfinished(folder)
            return _work(_placed(load_config(folder), folder), folder, grid, resume=True)
    config = as_run(asked)
    folder = create_run(config)
    with locked(folder):
        return _work(_placed(config, folder), folder, grid, resume=False)


def _placed(config: Config, folder: RunFolder) -> Config:
    """Return settings that name the folder where it is: simulated sites keep what is theirs there."""
    return replace(config, run=replace(config.run, dir=str(folder.path)))


def _work(config: Config, folder: RunFolder, grid: Grid, *, resume: bool) -> RunFolder:
    start = time.monotonic()
    run: ServerRun | None = None
    try:
        check_recipe(config)
        if resume:
            run = resume_run(config, folder)
        else:
            run = start_run(config, folder)
            announce(run)
        run.tracking.open(config, run_id=run.run_id, next_round=run.next_round)
        strategies = importlib.import_module("strategies")
        strategy = strategies.make(run)
        strategy.start(
            grid, ArrayRecord(), config.federation.rounds, config.federation.deadline, ConfigRecord()
        )
        write_manifest(
            folder,
            config=config,
            model={"name": config.model.called, "architecture": run.spec.base, "weights": run.weights},
            data=run.data,
            simulated=run.simulated,
        )
        if config.federation.mode != "base":
            personal = bool(run.plan(config.federation.rounds).personal)
            run_card(folder, folder.adapter_dir, personal=personal)
        # whoever started the server may stop it after the last event
        run.tracking.close(finished=True)
        append_event(folder, "run_finished", seconds=time.monotonic() - start)
    except BaseException as error:
        if run is not None:
            run.tracking.close(finished=False)
        _record_failure(folder, error, begun=run is not None)
        raise
    finally:
        _write_pages(folder)
    return folder


def _record_failure(folder: RunFolder, error: BaseException, *, begun: bool) -> None:
    reason = str(error) if isinstance(error, FedllmError) else f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt | SystemExit):
        reason = "interrupted"
    if begun:
        reason += f" (resume with run.resume={folder.path})"
    try:
        append_event(folder, "run_failed", reason=reason)
        if not isinstance(error, FedllmError):
            (folder.path / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    except (OSError, RunError):
        # the disk may be what failed; the error itself is raised to the caller
        return


def _write_pages(folder: RunFolder) -> None:
    try:
        write_metrics(folder)
        write_traffic(folder)
        write_report(folder)
    except (OSError, FedllmError) as error:
        print(f"the report could not be written: {error}")
