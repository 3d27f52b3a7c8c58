"""Speed and size of every codec against raw float32, on a random adapter state.

Run with ``python tests/benchmarks/bench_codecs.py [--numbers 42e6]`` (Mistral-7B at r = 16 on all linear
maps has 42 million). Codecs take turns, so that a slow moment of the machine meets all of them; the median of
the turns is shown. Set OPENBLAS_NUM_THREADS=1 and leave the cores alone.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.wire import decode, encode

CHAINS = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int4",
    "topk:0.25",
    "topk:0.25+int8",
    "topk:0.05+int8",
    "topk:0.01+int4",
)
MODULES = 16


def make_state(numbers: int) -> AdapterState:
    """Return normal numbers of deviation 0.01 in 16 matrices."""
    shape = (numbers // MODULES // 16, 16)
    spec = AdapterSpec(method="lora", rank=16, scale=1.0, shapes={}, basis="none", base="benchmark")
    rng = np.random.default_rng(0)
    return AdapterState(
        spec, {f"m{i}.B": rng.standard_normal(shape, np.float32) * np.float32(0.01) for i in range(MODULES)}
    )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", type=lambda text: int(float(text)), default=10_000_000)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    state = make_state(options.numbers)
    encoding: dict[str, list[float]] = {chain: [] for chain in CHAINS}
    decoding: dict[str, list[float]] = {chain: [] for chain in CHAINS}
    size: dict[str, int] = {}
    for _ in range(options.turns):
        for chain in CHAINS:
            start = time.perf_counter()
            payload = encode(state, codec=chain)
            middle = time.perf_counter()
            decode(payload, spec=state.spec, layout=state.layout, codec=chain)
            encoding[chain].append(middle - start)
            decoding[chain].append(time.perf_counter() - middle)
            size[chain] = len(payload)
    print(f"{state.size:,} numbers, median of {options.turns}\n")
    print("| codec | MB | of float32 | encode s | x float32 | decode s | x float32 |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for chain in CHAINS:
        share = size[chain] / size["float32"]
        row = [f"{size[chain] / 1e6:.2f}", f"{share:.4f}"]
        for seconds in (encoding, decoding):
            median = statistics.median(seconds[chain])
            row += [f"{median:.3f}", f"{median / statistics.median(seconds['float32']):.1f}"]
        print(f"| {chain} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
