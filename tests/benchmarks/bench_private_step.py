"""Time and memory of a private step over a plain one: fedllm's engine, Opacus' hooks, Opacus' ghost clipping.

Run with ``python tests/benchmarks/bench_private_step.py``; quick look: ``--only lora-8``. One thread. Engines
take turns within one process, in another order each turn, and time is the processor's; the allocator keeps
freed memory there, or an engine would pay for the pages that the one before it gave back. A step is forward,
backward, clipping, noise and AdamW. Peak memory is the median of three processes of an engine's own (SmolLM2:
one), above what the loaded model takes, without pages of files. The last line sums up; the exit code is 1
if the lower 95 % bound of one of our ratios is above its goal (time 1.05, memory 1.10).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooksFastGradientClipping
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm.config import Config
from fedllm.data.encode import Encoded
from fedllm.models.tiny import byte_tokenizer
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training.forward import record_losses
from fedllm.training.session import Session, open_session
from fedllm.training.spec import adapter_spec, basis_from_seed
from fedllm.training.steps import plain_gradients, private_gradients

#: Engine -> a number a turn or process.
Measures = dict[str, list[float]]

ENGINES = ("plain", "fedllm", "opacus hooks", "opacus ghost")
ADAPTERS = {
    "lora-8": ("lora", 8),
    "lora-32": ("lora", 32),
    "fed-sb-32": ("fed-sb", 32),
    "fed-sb-64": ("fed-sb", 64),
}
SHAPES = ((128, 8), (128, 32), (512, 8), (512, 32))
LARGE = (("smollm2-135m-instruct", 128, 8), ("smollm2-135m-instruct", 512, 2))
GOALS = {"time": 1.05, "memory": 1.10}
CLIP = 0.1
SMALL = "small"
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def make_small(folder: Path) -> None:
    """Write a Llama of 4 layers and width 256 (4.4 million numbers) with random weights."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_step(
    engine: str, *, model: str, path: str, adapter: str, tokens: int, batch: int
) -> Callable[[], None]:
    """Return a function that takes one training step."""
    method, rank = ADAPTERS[adapter]
    settings = {
        "model.name": model,
        "model.path": path,
        "model.dtype": "float32",
        "adapter.method": method,
        "adapter.rank": rank,
        "privacy.enabled": engine not in ("plain", "opacus ghost"),
        "privacy.noise_multiplier": 1.0 if engine not in ("plain", "opacus ghost") else 0.0,
        "privacy.engine": "opacus" if engine == "opacus hooks" else "own",
    }
    config = Config.from_flat(settings)
    spec = adapter_spec(config)
    basis = basis_from_seed(spec)
    assert basis is not None
    session = open_session(config, spec, basis)
    with torch.no_grad():
        for parameter in session.parameters.values():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    source = np.random.default_rng(0)
    drawn = source.integers(3, 250, size=(batch, tokens)).tolist()
    records = [Encoded(tuple(row[:-16]), tuple(row[-16:]), truncated=False) for row in drawn]
    optimizer = torch.optim.AdamW(session.parameters.values(), lr=1e-4)
    if engine == "opacus ghost":
        return ghost_step(session, records, optimizer)
    plan = PrivacyPlan(
        noise_multiplier=1.0,
        clipping_norm=CLIP,
        units=batch,
        sample_rate=1.0,
        expected_batch=float(batch),
        local_steps=1,
        rounds=1,
        delta=1e-5,
        relation="add-or-remove-one",
    )
    generator = SecureGenerator()
    units = [[record] for record in records]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if engine == "plain":
            plain_gradients(session, records, micro_batch=batch)
        else:
            private_gradients(
                session, session.parameters, units, plan=plan, generator=generator, micro_batch=batch
            )
        optimizer.step()

    return step


def ghost_step(
    session: Session, records: Sequence[Encoded], optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """Return a step with Opacus' ghost clipping: norms in one backward pass, clipped sums in a second."""
    hooks = GradSampleHooksFastGradientClipping(
        session.model, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="sum", strict=False
    )
    generator = SecureGenerator()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = record_losses(session, records)
        losses.sum().backward(retain_graph=True)
        factors = hooks.get_clipping_coef()
        optimizer.zero_grad(set_to_none=True)
        hooks.disable_hooks()
        (factors * losses).sum().backward()
        hooks.enable_hooks()
        for parameter in session.parameters.values():
            assert parameter.grad is not None
            noise = torch.from_numpy(CLIP * generator.normal(tuple(parameter.shape)))
            parameter.grad = ((parameter.grad.double() + noise) / len(records)).float()
        optimizer.step()

    return step


def peaks_mib(case: dict[str, object], *, processes: int) -> dict[str, list[float]]:
    """Return engine -> peak memory of two steps above what was held before them, MiB, of each process."""
    # forked from a process that has imported everything; memory does not mind neighbours on other cores
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__"])
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
        found = {
            engine: [pool.submit(peak_mib, engine, case) for _ in range(processes)] for engine in ENGINES
        }
        return {engine: [run.result() for run in runs] for engine, runs in found.items()}


def peak_mib(engine: str, case: dict[str, object]) -> float:
    """Return the peak memory of two steps above the memory before them, of this process."""
    torch.set_num_threads(1)
    step = make_step(engine, **case)  # type: ignore[arg-type]
    # the kernel's high-water mark starts anew from what is held now
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("RssAnon")
    step()
    step()
    # pages of libraries that are read for the first time are no engine's memory
    return status_mib("VmHWM") - status_mib("RssFile") - before


def last_line(arguments: Sequence[str], *, environment: dict[str, str]) -> str:
    """Return the last line that this script prints in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    printed = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    return printed.stdout.splitlines()[-1]


def status_mib(key: str) -> float:
    """Return a line of this process' status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure_time(case: dict[str, object], *, repeats: int) -> None:
    """Print engine -> processor seconds of each step, the engines taking turns (in this process)."""
    steps = {engine: make_step(engine, **case) for engine in ENGINES}  # type: ignore[arg-type]
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    order = np.random.default_rng(0)
    for repeat in range(repeats + 1):
        for engine in order.permutation(ENGINES).tolist():
            start = time.process_time()
            steps[engine]()
            if repeat:
                seconds[engine].append(time.process_time() - start)
    print(json.dumps(seconds))


def lower_bound(ours: Sequence[float], plain: Sequence[float]) -> float:
    """Return the lower end of the 95 % bootstrap interval of the ratio of medians, turns kept together."""
    source = np.random.default_rng(0)
    pairs = np.array([ours, plain])
    drawn = pairs[:, source.integers(0, len(ours), size=(2000, len(ours)))]
    return float(np.quantile(np.median(drawn[0], axis=1) / np.median(drawn[1], axis=1), 0.025))


def printed(case: str, seconds: Measures, memory: Measures) -> tuple[list[str], dict[str, float]]:
    """Print a case's row; return which of our goals it misses, and our two ratios."""
    cells = []
    for engine in ENGINES[1:]:
        time_ratio, memory_ratio = (ratio(measured, engine) for measured in (seconds, memory))
        cells.append(f"{time_ratio:.2f}, {memory_ratio:.2f}")
    bounds = {
        "time": lower_bound(seconds["fedllm"], seconds["plain"]),
        "memory": lower_bound(memory["fedllm"], memory["plain"]),
    }
    shown = ", ".join(f"{bound:.3f}" for bound in bounds.values())
    print(f"| {case} | {' | '.join(cells)} | {shown} |", flush=True)
    missed = [f"{kind} of {case}" for kind, bound in bounds.items() if bound > GOALS[kind]]
    return missed, {"time": ratio(seconds, "fedllm"), "memory": ratio(memory, "fedllm")}


def ratio(measured: Measures, engine: str) -> float:
    """Return an engine's median over that of the plain step."""
    return statistics.median(measured[engine]) / statistics.median(measured["plain"])


def main() -> None:
    """Print a Markdown table and a summary line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--processes", type=int, default=3, help="for memory, an engine")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--measure-time", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure_time:
        measure_time(json.loads(options.measure_time), repeats=options.repeats)
        return
    worst = {"time": 0.0, "memory": 0.0}
    missed = []
    print(
        "| case | "
        + " | ".join(f"{engine} time, memory" for engine in ENGINES[1:])
        + " | lower bounds of ours |"
    )
    print("|---|" + "--:|" * 4)
    with TemporaryDirectory() as folder:
        make_small(Path(folder))
        cases = [(SMALL, folder, adapter, *shape) for adapter in ADAPTERS for shape in SHAPES]
        cases += [
            (name, "", adapter, *shape) for name, *shape in LARGE for adapter in ("lora-8", "fed-sb-64")
        ]
        for model, path, adapter, tokens, batch in cases:
            name = f"{model} {adapter} {tokens}x{batch}"
            case = {"model": model, "path": path, "adapter": adapter, "tokens": tokens, "batch": batch}
            if options.only not in name:
                continue
            asked = ["--measure-time", json.dumps(case), "--repeats", str(options.repeats)]
            seconds = json.loads(last_line(asked, environment=KEEP_FREED))
            memory = peaks_mib(case, processes=options.processes if model == SMALL else 1)
            failed, ours = printed(name, seconds, memory)
            missed += failed
            worst = {kind: max(worst[kind], ours[kind]) for kind in worst}
    verdict = "missed: " + ", ".join(missed) if missed else "goals met"
    print(f"worst time ratio {worst['time']:.3f}, worst memory ratio {worst['memory']:.3f}; {verdict}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
