"""Randomness for privacy: never from the experiment's seed, never restored on resume."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


class SecureGenerator:
    """AES-256-CTR keystream under a fresh key from the operating system's entropy.

    It is not seedable on purpose: a site's noise and sampling must not be reproducible from
    anything the server, another site or a checkpoint knows.
    """

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return random 64-bit words."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8").astype(np.uint64)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return numbers uniform in [0, 1) with 53 random bits each."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        """Return standard normal float64 numbers (Box-Muller)."""
        count = int(np.prod(shape))
        pairs = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(pairs)))
        angle = 2.0 * np.pi * self.uniform(pairs)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:count].reshape(shape)
