"""A hostile peer gets a named refusal or sends finite numbers of the agreed layout; nothing else."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.adapters.state import AdapterSpec, AdapterState
from fedllm.errors import WireError
from fedllm.wire import decode, encode, expected_bytes
from fedllm.wire.sparse import positions_size

CHAINS = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int4",
    "topk:0.25",
    "topk:0.02",
    "topk:0.25+int8",
    "topk:0.02+int4",
    "topk:0.5+float16",
)
SPEC = AdapterSpec(method="lora", rank=5, scale=1.0, shapes={"m": (41, 7)}, basis="none", base="b")
RNG = np.random.default_rng(3)
STATE = AdapterState(
    SPEC,
    {"m.A": RNG.standard_normal((5, 7)).astype("f4"), "m.B": RNG.standard_normal((41, 5)).astype("f4")},
)


def split(payload: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(payload[:8], "little")
    return json.loads(payload[8 : 8 + length]), payload[8 + length :]


def join(header: object, numbers: bytes, *, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + numbers


def survives(payload: bytes, *, codec: str | None) -> bool:
    """Decode with every warning an error; tell whether the payload passed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            back = decode(payload, spec=SPEC, layout=STATE.layout, codec=codec)
        except WireError:
            return False
    assert back.layout == STATE.layout
    assert all(np.isfinite(value).all() for value in back.tensors.values())
    return True


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(CHAINS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@pytest.mark.parametrize("chain", CHAINS)
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_payload_is_refused_or_finite(chain: str, data: st.DataObject) -> None:
    payload = bytearray(encode(STATE, codec=chain))
    header, numbers = split(bytes(payload))
    kind = data.draw(
        st.sampled_from(["flip", "numbers", "cut", "grow", "noise", "header", "field", "length"])
    )
    if kind == "flip":
        for place in data.draw(
            st.lists(st.integers(0, len(payload) - 1), min_size=1, max_size=4, unique=True)
        ):
            payload[place] ^= data.draw(st.integers(1, 255))
    elif kind == "numbers":
        payload[-len(numbers) :] = RNG.bytes(len(numbers))
    elif kind == "cut":
        del payload[data.draw(st.integers(0, len(payload) - 1)) :]
    elif kind == "grow":
        payload += data.draw(st.binary(min_size=1, max_size=8192))
    elif kind == "noise":
        payload = bytearray(data.draw(st.binary(max_size=2000)))
    elif kind == "header":
        payload = bytearray(join(data.draw(JSON), numbers))
    elif kind == "length":
        payload = bytearray(join(header, numbers, length=data.draw(st.integers(0, 2**64 - 1))))
    else:
        table = data.draw(st.sampled_from(["__metadata__", "adapter", "other"]))
        if data.draw(st.booleans()):
            header[table] = data.draw(JSON)
        else:
            names = ["codec", "layout", "dtype", "shape", "data_offsets"]
            header.setdefault(table, {})[data.draw(st.sampled_from(names))] = data.draw(JSON)
        payload = bytearray(join(header, numbers))
    codec = data.draw(st.sampled_from([None, chain]))
    passed = survives(bytes(payload), codec=codec)
    if kind in ("cut", "grow", "noise"):
        assert not passed


@pytest.mark.parametrize("chain", CHAINS)
@settings(deadline=None, max_examples=30)
@given(offset=st.integers(0, 7))
def test_numbers_at_any_offset_are_read(chain: str, offset: int) -> None:
    header, numbers = split(encode(STATE, codec=chain))
    text = json.dumps(header).encode() + b" " * offset
    shifted = len(text).to_bytes(8, "little") + text + numbers
    back = decode(shifted, spec=SPEC, layout=STATE.layout, codec=chain)
    honest = decode(encode(STATE, codec=chain), spec=SPEC, layout=STATE.layout)
    assert all(np.array_equal(back.tensors[key], value) for key, value in honest.tensors.items())


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"dtype": "F64"}, "does not hold one adapter vector of"),
        ({"dtype": "I8"}, "does not hold one adapter vector of"),
        ({"shape": [10**15]}, "does not hold one adapter vector of"),
        ({"shape": [-1]}, "does not hold one adapter vector of"),
        ({"data_offsets": [0, 2**62]}, "does not hold one adapter vector of"),
        ({"extra": 1}, "does not hold one adapter vector of"),
    ],
)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_tensor_of_another_type_or_shape(chain: str, edit: dict[str, object], reason: str) -> None:
    header, numbers = split(encode(STATE, codec=chain))
    header["adapter"] |= edit
    with pytest.raises(WireError, match=reason):
        decode(join(header, numbers), spec=SPEC, layout=STATE.layout)


def refuse(numbers: bytes, chain: str, reason: str) -> None:
    header, _ = split(encode(STATE, codec=chain))
    with pytest.raises(WireError, match=reason):
        decode(join(header, numbers), spec=SPEC, layout=STATE.layout, codec=chain)


def test_positions_that_lie_are_named() -> None:
    chain, count = "topk:0.02", STATE.size
    kept = 5
    _, numbers = split(encode(STATE, codec=chain))
    assert positions_size(count, kept) == 4 * kept
    for indices in ([0, 1, 2, 2, 3], [4, 3, 2, 1, 0], [0, 0, 0, 0, 0]):
        refuse(np.array(indices, "<u4").tobytes() + numbers[20:], chain, "strictly ascending")
    for last in (count, 2**32 - 1):
        refuse(np.array([0, 1, 2, 3, last], "<u4").tobytes() + numbers[20:], chain, "not below 240")

    chain, kept = "topk:0.25", 60
    _, numbers = split(encode(STATE, codec=chain))
    bitmap = np.frombuffer(numbers[:30], np.uint8)
    for other in (bitmap * 0, bitmap | 255, bitmap ^ np.eye(1, 30, dtype=np.uint8)[0]):
        refuse(other.tobytes() + numbers[30:], chain, "does not mark 60 positions")


def test_a_bit_behind_the_last_position_is_named() -> None:
    state = AdapterState(SPEC, {"m.A": np.array([1, 2, 3], "f4")})
    header, numbers = split(encode(state, codec="topk:0.5"))
    with pytest.raises(WireError, match="not below 3"):
        decode(join(header, b"\x41" + numbers[1:]), spec=SPEC, layout=state.layout)


@pytest.mark.parametrize("scale", [0x7F80, 0xFF80, 0x7FC0, 0xBF80, 0x8000, 0x0000, 0x0001])
@pytest.mark.parametrize("chain", ["int8", "int4"])
def test_scales_that_are_infinite_nan_negative_or_zero(chain: str, scale: int) -> None:
    _, numbers = split(encode(STATE, codec=chain))
    refuse(scale.to_bytes(2, "little") + numbers[2:], chain, "not a positive, finite number")


def test_codes_out_of_range_and_products_that_overflow() -> None:
    for chain in ("int8", "int4"):
        _, numbers = split(encode(STATE, codec=chain))
        refuse(numbers[:-1] + b"\x00", chain, "out of its range")
        refuse(b"\x7f\x7f" * 4 + b"\xff" * (len(numbers) - 8), chain, "NaN or infinity")
    state = AdapterState(SPEC, {"m.A": np.array([1.0], "f4")})
    header, numbers = split(encode(state, codec="int4"))
    with pytest.raises(WireError, match="out of its range"):
        decode(join(header, numbers[:-1] + b"\xff"), spec=SPEC, layout=state.layout)


@pytest.mark.parametrize("chain", CHAINS)
def test_the_peer_does_not_choose_the_codec(chain: str) -> None:
    payload = encode(STATE, codec=chain)
    decode(payload, spec=SPEC, layout=STATE.layout, codec=chain)
    for other in CHAINS:
        if other != chain:
            with pytest.raises(WireError, match=r"was agreed on|oversized"):
                decode(payload, spec=SPEC, layout=STATE.layout, codec=other)


def test_a_codecs_text_is_never_quoted() -> None:
    header, numbers = split(encode(STATE, codec="int8"))
    header["__metadata__"]["codec"] = "\ud800 <script>"
    with pytest.raises(WireError, match=r"^the payload names no known codec\.$"):
        decode(join(header, numbers), spec=SPEC, layout=STATE.layout)


def peak(payload: bytes, layout: dict[str, tuple[int, ...]], codec: str | None) -> tuple[int, bool]:
    tracemalloc.start()
    try:
        decode(payload, spec=SPEC, layout=layout, codec=codec)
        return tracemalloc.get_traced_memory()[1], True
    except WireError:
        return tracemalloc.get_traced_memory()[1], False
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", [None, "float32"])
def test_a_claim_of_a_huge_tensor_takes_no_memory(codec: str | None) -> None:
    layout = {"m.A": (512, 512)}
    room = 4 * 512 * 512
    header, numbers = split(encode(STATE, codec="float32"))
    header["adapter"] |= {"shape": [2**40], "data_offsets": [0, 2**42]}
    bomb = b'{"a":[' + b"[]," * (room // 3) + b"[]]}"
    hostile = [
        join(header, numbers),
        join(header, bytes(room)),
        (2**63).to_bytes(8, "little") + bytes(room),
        len(bomb).to_bytes(8, "little") + bomb,
        join([[[]]] * 500, bytes(room)),
    ]
    for payload in hostile:
        taken, passed = peak(payload, layout, codec)
        assert not passed
        assert taken < 200_000


@pytest.mark.parametrize("chain", CHAINS)
def test_decoding_takes_a_few_times_the_layout(chain: str) -> None:
    layout = {"m.A": (512, 512)}
    room = 4 * 512 * 512
    state = AdapterState(SPEC, {"m.A": RNG.standard_normal((512, 512)).astype("f4")})
    payload = encode(state, codec=chain)
    header, numbers = split(payload)
    assert len(numbers) == expected_bytes(chain, 512 * 512)
    for candidate in (payload, join(header, b"\xff" * len(numbers)), join(header, RNG.bytes(len(numbers)))):
        taken, _ = peak(candidate, layout, chain)
        assert taken < 5 * (len(candidate) + room)
