"""What a model card has to say of data and models, which the card's own room does not know."""

from __future__ import annotations

from dataclasses import replace

from fedllm.config import Config, DataSettings
from fedllm.data.sources import default_instruction
from fedllm.models.registry import EMBEDDED
from fedllm.runs.usage import Usage
from fedllm.training.spec import public_labels


def usage_of(config: Config, *, simulated: bool) -> Usage:
    """Return what it takes to use what a run has written.

    Parameters
    ----------
    simulated : bool
        Whether sites took the recipe's data; real ones have files of their own.
    """
    data = config.data if simulated else replace(config.data, source="file")
    return Usage(
        embedded=config.model.name in EMBEDDED and not config.model.path,
        labels=known_labels(data),
        instruction=default_instruction(data),
    )


def known_labels(data: DataSettings) -> tuple[str, ...]:
    """Return the labels of a recipe in order; none where they are found in records, which are the sites'."""
    if data.task == "classify" and (data.labels or data.source in ("icd10", "mcc")):
        return public_labels(data)
    return ()
