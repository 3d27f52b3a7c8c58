"""Codecs: exact where they claim it, safe against a hostile peer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load

from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.errors import WireError
from fedllm.wire import decode, encode

SPEC = AdapterSpec(
    method="fed-sb", rank=3, scale=1.0, shapes={"m": (4, 5), "n": (4, 5)}, basis="seeded:00", base="b"
)
MATRIX = hnp.arrays(np.float32, (3, 3), elements=st.floats(-(2.0**14), 2.0**14, width=32))


def make_state(first: np.ndarray, second: np.ndarray) -> AdapterState:
    return AdapterState(SPEC, {"m.R": first, "n.R": second})


@settings(deadline=None)
@given(MATRIX, MATRIX)
def test_float32_is_bit_exact_and_others_round_to_nearest(first: np.ndarray, second: np.ndarray) -> None:
    state = make_state(first, second)
    for name, kind in (("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        back = decode(encode(state, codec=name), spec=SPEC, layout=state.layout)
        for key, value in state.tensors.items():
            expected = torch.tensor(value).to(kind).float().numpy()
            assert np.array_equal(back.tensors[key], expected), name
            assert not back.tensors[key].flags.writeable


def test_a_payload_is_little_more_than_its_numbers() -> None:
    state = make_state(np.ones((3, 3), np.float32), np.ones((3, 3), np.float32))
    assert len(encode(state, codec="float32")) - 4 * state.size < 256
    assert len(encode(state, codec="bfloat16")) < len(encode(state, codec="float32"))


def test_a_payload_is_a_safetensors_file_and_equal_states_give_equal_bytes() -> None:
    state = make_state(np.eye(3, dtype=np.float32), np.ones((3, 3), np.float32))
    for codec, dtype in (("float32", np.float32), ("bfloat16", np.uint16), ("topk:0.5+int4", np.uint8)):
        payload = encode(state, codec=codec)
        assert all(encode(state, codec=codec) == payload for _ in range(20))
        assert load(payload)["adapter"].dtype == dtype
    assert load(encode(state, codec="float32"))["adapter"][9:].tolist() == [1.0] * 9


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_payload_never_crashes_and_never_passes_silently(data: st.DataObject) -> None:
    state = make_state(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32))
    payload = bytearray(encode(state, codec="float32"))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "noise"]))
    if kind == "flip":
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del payload[data.draw(st.integers(0, len(payload) - 1)) :]
    elif kind == "grow":
        payload += data.draw(st.binary(min_size=1, max_size=8192))
    else:
        payload = bytearray(data.draw(st.binary(max_size=2000)))
    try:
        back = decode(bytes(payload), spec=SPEC, layout=state.layout)
    except WireError:
        return
    # only a flip inside the numbers can pass, and then they are finite and of the right shape
    assert kind == "flip"
    assert back.layout == state.layout
    assert all(np.isfinite(value).all() for value in back.tensors.values())


def test_not_finite_oversized_and_foreign_payloads_are_named() -> None:
    state = make_state(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32))
    bad = make_state(np.full((3, 3), np.nan, np.float32), np.eye(3, dtype=np.float32))
    with pytest.raises(WireError, match="NaN or infinity; it is not sent"):
        encode(bad, codec="float32")
    payload = encode(state, codec="float32")
    nan = payload.replace(np.float32(1.0).tobytes(), np.float32(np.nan).tobytes())
    with pytest.raises(WireError, match="NaN or infinity in the adapter"):
        decode(nan, spec=SPEC, layout=state.layout)
    with pytest.raises(WireError, match="oversized payload"):
        decode(payload + bytes(10_000), spec=SPEC, layout=state.layout)
    other = AdapterSpec(**{**vars(SPEC), "base": "c"})
    with pytest.raises(WireError, match="not those agreed on"):
        decode(payload, spec=other, layout=state.layout)
    with pytest.raises(WireError, match="range of float16"):
        encode(make_state(np.full((3, 3), 1e6, np.float32), np.eye(3, dtype=np.float32)), codec="float16")
