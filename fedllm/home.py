"""Where fedllm keeps what outlives a run: converted models, runs without a folder of their own."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return ``$FEDLLM_HOME``, or ``~/.cache/fedllm`` when it is unset or empty."""
    return Path(os.environ.get("FEDLLM_HOME") or "~/.cache/fedllm").expanduser().absolute()
