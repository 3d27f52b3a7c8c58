"""What every codec keeps, against plain re-statements of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.errors import MismatchError, WireError
from fedllm.wire import compress, decode, encode, encode_with_feedback, expected_bytes, parse_codec

FORMATS = ("float32", "float16", "bfloat16", "int8", "int4")
SHARES = ("0.01", "0.1", "0.25", "0.75", "1")
CHAINS = FORMATS + tuple(f"topk:{share}+{name}" for share in SHARES for name in FORMATS)
LEVELS = {"int8": 127, "int4": 7}
SMALLEST = np.finfo(np.float32).smallest_normal

ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
MILD = st.floats(-(2.0**10), 2.0**10, width=32)
SIZES = st.integers(1, 400)
chains = st.sampled_from(CHAINS)


def vectors(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    """Return vectors of few distinct numbers (many ties) and of many."""
    few = hnp.arrays(np.float32, SIZES, elements=elements)
    seeds = st.tuples(st.integers(0, 2**32), SIZES, st.sampled_from([1e-42, 1e-30, 1e-6, 1e-2, 1.0, 1e3]))
    many = seeds.map(
        lambda case: (np.random.default_rng(case[0]).standard_t(2, case[1]).clip(-50, 50) * case[2]).astype(
            "f4"
        )
    )
    return few | many


def state_of(*matrices: np.ndarray) -> AdapterState:
    spec = AdapterSpec(method="lora", rank=1, scale=1.0, shapes={"m": (1, 1)}, basis="none", base="b")
    return AdapterState(spec, {f"m{i}.A": value for i, value in enumerate(matrices)})


def flat(state: AdapterState) -> np.ndarray:
    return np.concatenate([value.ravel() for value in state.tensors.values()])


def steps(vector: np.ndarray, levels: int, width: int) -> np.ndarray:
    """Return every number's step: the bfloat16 of its block's largest magnitude / levels."""
    out = np.empty(vector.size, np.float32)
    for start in range(0, vector.size, width):
        peak = np.abs(vector[start : start + width]).max() / np.float32(levels)
        out[start : start + width] = torch.tensor(max(peak, SMALLEST)).to(torch.bfloat16).float().item()
    return out.astype(np.float64)


def kept_by_sorting(vector: np.ndarray, kept: int) -> np.ndarray:
    return np.sort(np.lexsort((np.arange(vector.size), -np.abs(vector).astype(np.float64)))[:kept])


@settings(deadline=None)
@given(vectors(ANY))
def test_float32_is_bit_exact(vector: np.ndarray) -> None:
    back = decode(
        encode(state_of(vector), codec="float32"), spec=state_of().spec, layout={"m0.A": vector.shape}
    )
    assert back.tensors["m0.A"].tobytes() == vector.tobytes()


@settings(deadline=None)
@given(vectors(ANY))
@example(np.array([65519.996, -65504, 6e-8, 2.9e-8, 1e-42, -0.0], np.float32))
def test_sixteen_bits_round_as_torch_does(vector: np.ndarray) -> None:
    for name, kind in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        expected = torch.tensor(vector).to(kind).float().numpy()
        if np.isfinite(expected).all():
            assert compress(vector, name).tobytes() == expected.tobytes()
        else:
            with pytest.raises(WireError, match=f"range of {name}"):
                compress(vector, name)


@settings(deadline=None)
@given(vectors(ANY), st.sampled_from(["int8", "int4"]))
@example(np.full(65, 1e-45, np.float32), "int8")
@example(np.full(65, -np.finfo(np.float32).max), "int8")
@example(np.full(65, np.finfo(np.float32).max), "int4")
def test_integers_err_by_at_most_half_a_step(vector: np.ndarray, name: str) -> None:
    back = compress(vector, name).astype(np.float64)
    # the quotient of number and step is itself rounded to 24 bits
    half = 0.5 + 1e-5
    assert (np.abs(back - vector) <= half * steps(vector, LEVELS[name], 64)).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "topk:0.5+bfloat16"])
def test_beyond_the_range_is_refused_when_sent(name: str) -> None:
    with pytest.raises(WireError, match="exceeds the range"):
        compress(np.array([np.finfo(np.float32).max, 1], np.float32), name)


@settings(deadline=None)
@given(vectors(ANY), st.sampled_from(SHARES))
def test_topk_keeps_exactly_the_largest(vector: np.ndarray, share: str) -> None:
    kept = -(-int(float(share) * 100) * vector.size // 100)
    positions = kept_by_sorting(vector, kept)
    expected = np.zeros_like(vector)
    expected[positions] = vector[positions]
    assert compress(vector, f"topk:{share}").tobytes() == expected.tobytes()


@settings(deadline=None)
@given(vectors(MILD), st.sampled_from(SHARES), st.sampled_from(FORMATS))
def test_a_chain_is_its_parts_one_after_the_other(vector: np.ndarray, share: str, name: str) -> None:
    sparse = compress(vector, f"topk:{share}")
    back = compress(vector, f"topk:{share}+{name}")
    if name not in LEVELS:
        assert np.array_equal(back, compress(sparse, name))
        return
    kept = -(-int(float(share) * 100) * vector.size // 100)
    width = -(-vector.size // -(-kept // 64))
    assert (back[sparse == 0] == 0).all()
    bound = (0.5 + 1e-5) * steps(sparse, LEVELS[name], width)
    assert (np.abs(back.astype(np.float64) - sparse) <= bound).all()


@settings(deadline=None, max_examples=400)
@given(vectors(MILD), chains)
def test_encoding_what_was_decoded_changes_nothing(vector: np.ndarray, chain: str) -> None:
    state = state_of(vector)
    first = decode(encode(state, codec=chain), spec=state.spec, layout=state.layout)
    payload = encode(first, codec=chain)
    second = decode(payload, spec=state.spec, layout=state.layout)
    assert np.array_equal(flat(first), flat(second))
    assert encode(second, codec=chain) == payload
    assert np.array_equal(flat(first), compress(vector, chain))


@settings(deadline=None, max_examples=200)
@given(vectors(MILD), chains)
def test_expected_bytes_is_what_is_sent(vector: np.ndarray, chain: str) -> None:
    payload = encode(state_of(vector), codec=chain)
    header = 8 + int.from_bytes(payload[:8], "little")
    assert len(payload) == header + expected_bytes(chain, vector.size)
    assert header < 256
    assert parse_codec(chain).pack(vector).nbytes == expected_bytes(chain, vector.size)


@pytest.mark.parametrize("chain", CHAINS)
def test_zeros_and_single_numbers(chain: str) -> None:
    for count in (1, 2, 63, 64, 65, 1000):
        assert not compress(np.zeros(count, np.float32), chain).any()
    for value in (0.5, -2.0, 1.0):
        assert compress(np.array([value], np.float32), chain) == pytest.approx([value], rel=0.01)
    assert abs(compress(np.array([1e-45], np.float32), chain)[0]) <= 1e-40
    state = state_of(np.ones((1, 1), np.float32), np.zeros((0, 4), np.float32), np.ones((2, 3), np.float32))
    back = decode(encode(state, codec=chain), spec=state.spec, layout=state.layout, codec=chain)
    assert back.layout == state.layout


@settings(deadline=None, max_examples=150)
@given(chains, st.integers(0, 2**32), st.integers(1, 12), st.sampled_from([1e-30, 1e-3, 1e2]))
def test_error_feedback_telescopes(chain: str, seed: int, rounds: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 12)), int(rng.integers(1, 12)))
    memory: AdapterState | None = None
    deltas, messages = np.zeros(shape), np.zeros(shape)
    size = 0.0
    for _ in range(rounds):
        delta = state_of((rng.standard_normal(shape) * scale).astype(np.float32))
        payload, memory = encode_with_feedback(delta, memory, codec=chain)
        sent = decode(payload, spec=delta.spec, layout=delta.layout, codec=chain)
        deltas += delta.tensors["m0.A"]
        messages += sent.tensors["m0.A"]
        size += float(np.abs(delta.tensors["m0.A"]).max())
    assert memory is not None
    last = memory.tensors["m0.A"].astype(np.float64)
    # every round rounds a sum of at most this size once to float32, and the difference once
    assert (np.abs(messages + last - deltas) <= 2 * rounds * size * 2.0**-24).all()
    if chain == "float32":
        assert not last.any()


def test_error_feedback_sends_what_it_kept_and_refuses_another_adapters_memory() -> None:
    delta = state_of(np.array([[3.0, 2.0, 1.0, 0.5]], np.float32))
    still = delta.zeros()
    payload, memory = encode_with_feedback(delta, None, codec="topk:0.25")
    received = flat(decode(payload, spec=delta.spec, layout=delta.layout))
    for _ in range(3):
        payload, memory = encode_with_feedback(still, memory, codec="topk:0.25")
        received = received + flat(decode(payload, spec=delta.spec, layout=delta.layout))
    assert received.tolist() == [3.0, 2.0, 1.0, 0.5]
    assert not flat(memory).any()
    with pytest.raises(MismatchError, match="another adapter"):
        encode_with_feedback(state_of(np.ones((2, 2), np.float32)), memory, codec="topk:0.25")
    huge = state_of(np.full((1, 4), 3e38, np.float32))
    with pytest.raises(WireError, match="NaN or infinity"):
        encode_with_feedback(huge, huge, codec="topk:0.25")
