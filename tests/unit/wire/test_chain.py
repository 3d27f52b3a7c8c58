"""Codecs by name: what is accepted, what is said of the rest, and what the list promises."""

from __future__ import annotations

import numpy as np
import pytest

from fedllm.errors import ConfigError
from fedllm.wire import CODECS, compress, expected_bytes, is_lossless, parse_codec


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("float32", "float32"),
        ("int4", "int4"),
        ("topk:.25", "topk:0.25"),
        ("topk:0.2500+int8", "topk:0.25+int8"),
        ("topk:0.25+float32", "topk:0.25"),
        ("topk:0.0001+bfloat16", "topk:0.0001+bfloat16"),
        ("topk:1.0", "topk:1"),
    ],
)
def test_a_codec_has_one_canonical_name(text: str, name: str) -> None:
    assert parse_codec(text).name == name
    assert parse_codec(name) == parse_codec(text)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("int9", "; did you mean int8?"),
        ("bf16", "; did you mean bfloat16?"),
        ("topk", "; did you mean topk:0.25?"),
        ("topk:2", "; did you mean topk:0.25?"),
        ("topk:0+int4", "; did you mean topk:0.25+int4?"),
        ("topk:0.1+int7", "; did you mean topk:0.1+int8?"),
        ("topk:0.1+", "; did you mean topk:0.1?"),
        ("topk:nan", "; did you mean topk:0.25?"),
        ("topk:0.12345", "; did you mean topk:0.25?"),
        ("topk:0.5\n", "; did you mean topk:0.25?"),
        ("float32:0.5", "; did you mean float32?"),
        ("gzip", "."),
        ("", "."),
    ],
)
def test_an_unknown_codec_is_refused_with_the_nearest_and_all_allowed(text: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_codec(text)
    message = str(caught.value)
    assert message.startswith(
        f"unknown codec '{text}'{near} Allowed: float32, float16, bfloat16, int8, int4,"
    )
    assert "topk:SHARE+FORMAT" in message


def test_a_suggestion_is_itself_a_codec() -> None:
    for text in ("topk:0", "topk:0.0000+int8", "topk:x"):
        with pytest.raises(ConfigError) as caught:
            parse_codec(text)
        parse_codec(str(caught.value).split("did you mean ")[1].split("?")[0])


def test_only_float32_is_lossless() -> None:
    assert is_lossless("float32")
    assert not any(
        is_lossless(name) for name in ("float16", "bfloat16", "int8", "int4", "topk:1", "topk:0.5")
    )


def test_the_list_tells_the_truth() -> None:
    assert list(CODECS) == ["float32", "float16", "bfloat16", "int8", "int4", "topk"]
    for name, codec in CODECS.items():
        assert name == codec.name
        assert codec.description
        assert codec.purpose
        if codec.format is not None:
            assert codec.format.name == name
            assert 8 * expected_bytes(name, 6400) == float(codec.bits) * 6400
            assert codec.lossy == (not is_lossless(name))


def test_the_share_is_exact_and_rounded_up() -> None:
    # 0.07 * 100 is 7.000000000000001 in floating point
    assert np.count_nonzero(compress(np.arange(1, 101, dtype=np.float32), "topk:0.07")) == 7
    assert np.count_nonzero(compress(np.ones(10, np.float32), "topk:0.11")) == 2
    assert np.count_nonzero(compress(np.ones(10, np.float32), "topk:0.0001")) == 1


def test_positions_travel_in_the_smaller_form() -> None:
    values = {kept: 4 * kept for kept in (312, 313)}
    assert expected_bytes("topk:0.0312", 10_000) == 4 * 312 + values[312]
    assert expected_bytes("topk:0.0313", 10_000) == 1250 + values[313]


def test_compress_returns_a_new_array() -> None:
    vector = np.ones(3, np.float32)
    compress(vector, "float32")[0] = 5
    assert vector[0] == 1
