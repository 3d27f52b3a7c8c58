"""Randomness for privacy: never from the experiment's seed, never restored on resume."""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt
import torch
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
        """Return standard normal float64 numbers (Box-Muller, in PyTorch: its loops are vectorised)."""
        count = int(np.prod(shape))
        pairs = (count + 1) // 2
        radius = torch.from_numpy(self.uniform(pairs)).neg_().log1p_().mul_(-2.0).sqrt_()
        angle = torch.from_numpy(self.uniform(pairs)).mul_(2.0 * math.pi)
        both = torch.cat([radius * angle.cos(), radius * angle.sin()])
        drawn: npt.NDArray[np.float64] = both[:count].reshape(shape).numpy()
        return drawn
