"""Server cost of aggregation at Mistral-7B's shapes (r = 16, all linear layers): time and peak memory.

Run with ``make bench`` or ``python tests/benchmarks/bench_aggregation.py [--modules 224] [--sites 2 4 8]``.
Each measurement is a process of its own, so that its peak memory is its own. ``factors`` is ours;
``dense`` forms every module's (m x n) sum and its SVD, as public FlexLoRA code does, and is measured on
a few modules and scaled up: all of them would take hours. Nothing else may use the cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

from fedllm.adapters import METHODS
from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.aggregation import RULES, Update
from fedllm.settings import StrategySettings
from fedllm.wire import decode, encode

RANK = 16
LAYER = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}


def make_spec(modules: int) -> AdapterSpec:
    """Return the LoRA spec of the first modules of Mistral-7B."""
    names = [f"model.layers.{layer}.{name}" for layer in range(32) for name in LAYER]
    shapes = {name: LAYER[name.rpartition(".")[2]] for name in names[:modules]}
    return AdapterSpec(method="lora", rank=RANK, scale=1.0, shapes=shapes, basis="none", base="bench")


def replies(spec: AdapterSpec, sites: int) -> tuple[AdapterState, list[bytes]]:
    """Return the current state and every site's encoded reply."""
    start = METHODS["lora"].initial_state(spec, seed="0")
    payloads = []
    for site in range(sites):
        rng = np.random.default_rng(site)
        noise = {k: rng.standard_normal(v.shape, dtype=np.float32) * 0.01 for k, v in start.tensors.items()}
        state = start.with_tensors({key: start.tensors[key] + value for key, value in noise.items()})
        payloads.append(encode(state, codec="float32"))
    return start, payloads


def ours(rule: str, modules: int, sites: int) -> dict[str, float]:
    """Decode and aggregate as the server does; return seconds and memory in bytes of the replies."""
    spec = make_spec(modules)
    start, payloads = replies(spec, sites)
    size = sum(len(payload) for payload in payloads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = _resident()
    begin = time.perf_counter()

    def updates():  # type: ignore[no-untyped-def]
        payloads.reverse()
        for site in range(sites):
            state = decode(payloads.pop(), spec=spec, layout=start.layout)
            yield Update(site=str(site), state=state, weight=1.0)

    RULES[rule](StrategySettings(), private=False).combine(start, updates(), round=1)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # what was resident before held the replies themselves
    return {"seconds": seconds, "memory": (max(peak, before) - held + size) / size, "replies": size}


def dense(modules: int, sites: int) -> dict[str, float]:
    """Form every module's dense sum and cut it by a full SVD."""
    spec = make_spec(modules)
    start, payloads = replies(spec, sites)
    states = [decode(payload, spec=spec, layout=start.layout) for payload in payloads]
    begin = time.perf_counter()
    for module in spec.shapes:
        total = sum(s.tensors[f"{module}.B"] @ s.tensors[f"{module}.A"] / sites for s in states)
        left, values, right = np.linalg.svd(total, full_matrices=False)
        _ = left[:, :RANK] * values[:RANK], right[:RANK]
    return {"seconds": time.perf_counter() - begin}


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(kind: str, modules: int, sites: int) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", kind, "--modules", str(modules), "--sites", str(sites)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", default="")
    parser.add_argument("--modules", type=int, default=224)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--dense-modules", type=int, default=2)
    given = parser.parse_args()
    if given.one:
        kind, sites = given.one, given.sites[0]
        found = dense(given.modules, sites) if kind == "dense" else ours(kind, given.modules, sites)
        print(json.dumps(found))
        return
    print(f"{given.modules} modules, r={RANK}; memory: peak of the server over the bytes of the replies\n")
    print("| sites | rule | modules | seconds | memory / replies |\n|--:|---|--:|--:|--:|")
    for sites in given.sites:
        # 64 sites of all modules are 10.7 GB of replies: a part of the modules shows the growth
        modules = given.modules if sites <= 8 else max(1, given.modules // 8)
        for rule in ("fedit", "fedex", "flexlora", "florist"):
            found = measure(rule, modules, sites)
            row = (sites, rule, modules, f"{found['seconds']:.1f}", f"{found['memory']:.2f}")
            print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
    few = given.dense_modules
    slow, fast = (measure(kind, few, 8)["seconds"] for kind in ("dense", "flexlora"))
    print(f"\n8 sites, {few} modules: dense sum and full SVD {slow:.1f} s, factors {fast:.2f} s")
    print(f"{slow / fast:.0f} times")


if __name__ == "__main__":
    main()
