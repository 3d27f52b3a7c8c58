"""fedllm: federated fine-tuning of language models; only adapter matrices leave a site."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fedllm.config import Config
from fedllm.errors import FedllmError

if TYPE_CHECKING:
    from fedllm.federation.inprocess import RunResult

# On import it warns of an optional package nobody here needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["Config", "FedllmError", "__version__", "run"]


def run(config: Config) -> RunResult:
    """Run a recipe in this process; see :func:`fedllm.federation.inprocess.run`."""
    # imported late: `import fedllm` stays free of torch and flwr
    from fedllm.federation.inprocess import run as run_in_process

    return run_in_process(config)
