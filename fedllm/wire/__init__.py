"""Adapter state <-> bytes: codecs and safe decoding."""

from fedllm.wire.chain import Chain, compress, expected_bytes, is_lossless, parse_codec
from fedllm.wire.codec import decode, encode
from fedllm.wire.feedback import encode_with_feedback
from fedllm.wire.registry import CODECS, Codec

__all__ = [
    "CODECS",
    "Chain",
    "Codec",
    "compress",
    "decode",
    "encode",
    "encode_with_feedback",
    "expected_bytes",
    "is_lossless",
    "parse_codec",
]
