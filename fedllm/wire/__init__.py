"""Adapter state <-> bytes: codecs and safe decoding."""

from fedllm.wire.codec import CODECS, decode, encode

__all__ = ["CODECS", "decode", "encode"]
