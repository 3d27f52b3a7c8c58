"""Wall time of a simulated run over the pure training time of the same steps in one process.

Run with ``make bench`` or ``python tests/benchmarks/bench_simulation.py [--model NAME]``. Both are
measured in this script on the same recipe, the one-process training before and after the simulated run;
the fixed start of Flower and Ray is reported by itself. Nothing else may use the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from fedllm.config import Config

ROOT = Path(__file__).parents[2]


def settings(model: str) -> dict[str, Any]:
    """Return a small non-private run: 4 sites, 4 rounds, no evaluation."""
    return {
        "model.name": model,
        "adapter.rank": 16,
        "data.source": "icd10",
        "data.min_per_label": 800,
        "data.max_per_label": 800,
        "federation.sites": 4,
        "federation.rounds": 4,
        "train.batch_size": 8,
        "train.local_steps": 4,
        "train.max_length": 64,
        "evaluation.every": 0,
        "evaluation.final_records": 1,
    }


def pure_training(values: dict[str, Any]) -> float:
    """Return seconds of one round's steps of all sites in this process, all cores, after a warm-up."""
    import torch

    from fedllm.data.sites import simulated_site
    from fedllm.training.round import train_round
    from fedllm.training.session import open_session, tokenise
    from fedllm.training.spec import adapter_spec, basis_from_seed, basis_seed

    torch.set_num_threads(os.cpu_count() or 1)
    config = Config.from_flat(values)
    spec = adapter_spec(config)
    basis = basis_from_seed(spec)
    assert basis is not None
    session = open_session(config, spec, basis)
    state = session.method.initial_state(spec, seed=basis_seed(config))
    sites = [
        tokenise(simulated_site(config.data, sites=4, seed=config.run.seed, index=index), config)
        for index in range(4)
    ]

    def train(site: Any, round: int) -> None:
        names = session.method.matrices(spec)
        train_round(session, site, config=config, state=state, round=round, plan=None, train=names)

    train(sites[0], 1)
    rounds = []
    for round in (2, 3):
        start = time.perf_counter()
        for site in sites:
            train(site, round)
        rounds.append(time.perf_counter() - start)
    return statistics.median(rounds)


def simulate(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the recipe with ``fedllm run`` and return its times and peak memories."""
    recipe = folder / "recipe.toml"
    recipe.write_text(Config.from_flat(values).to_toml(), encoding="utf-8")
    start = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedllm.cli.app", "run", str(recipe), f"run.dir={folder / 'run'}"],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
    )
    peaks: dict[str, float] = {}
    watcher = threading.Thread(target=_watch, args=(process, peaks))
    watcher.start()
    code = process.wait()
    watcher.join()
    if code != 0:
        raise SystemExit(f"the run failed with exit code {code}")
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    rounds = [event["seconds"] for event in events if event["event"] == "round_finished"]
    first = next(event for event in events if event["event"] == "round_started")
    return {
        "seconds from command to the first round": datetime.fromisoformat(first["time"]).timestamp() - start,
        "first round": rounds[0],
        "later rounds, median": statistics.median(rounds[1:]),
        "peak MiB": peaks,
    }


def _watch(process: subprocess.Popen[bytes], peaks: dict[str, float]) -> None:
    """Record the largest resident size of the server's and of any site's process."""
    while process.poll() is None:
        try:
            children = psutil.Process(process.pid).children(recursive=True)
            everything = {child.pid: child for child in children}
            for child in psutil.process_iter(["cmdline", "environ"]):
                if "fedllm/flwr" in (child.info["environ"] or {}).get("FLWR_HOME", ""):
                    everything[child.pid] = child
            for child in everything.values():
                words = " ".join(child.cmdline())
                kind = "site" if "ClientAppActor" in words else "server" if "simulation" in words else ""
                if kind:
                    size = child.memory_info().rss / 2**20
                    peaks[kind] = max(peaks.get(kind, 0.0), size)
        except (psutil.Error, OSError):
            pass
        time.sleep(0.5)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    values = settings(parser.parse_args().model)
    # in a process of its own, so that this one holds no threads while the simulation runs
    code = "import sys, json; sys.path.insert(0, sys.argv[1]); import bench_simulation as b; "
    code += "print(json.dumps(b.pure_training(json.loads(sys.argv[2]))))"
    here = str(Path(__file__).parent)
    pure = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            out = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code, here, json.dumps(values)],
                capture_output=True,
                text=True,
                check=True,
            )
            pure.append(float(out.stdout.strip().splitlines()[-1]))
            if len(pure) == 1:
                found = simulate(values, Path(folder))
    found["pure training of a round, one process, all cores"] = statistics.median(pure)
    found["ratio (later rounds / pure training)"] = found["later rounds, median"] / statistics.median(pure)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
