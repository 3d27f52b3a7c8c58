"""What a model card has to say of data and models, which the card's own room does not know."""

from __future__ import annotations

from pathlib import Path

from fedllm.adapters.export import WEIGHTS_FILE
from fedllm.config import Config
from fedllm.data.sources import default_instruction, public_labels
from fedllm.models.registry import EMBEDDED
from fedllm.runs.card import write_card, write_plain_card
from fedllm.runs.folder import RunFolder
from fedllm.runs.manifest import settings_of
from fedllm.runs.usage import Form, Usage
from fedllm.settings import DataSettings


def run_card(
    folder: RunFolder,
    target: Path,
    *,
    form: Form | None = None,
    file: str = "",
    personal: bool = False,
    site: str = "",
) -> Path:
    """Write the model card of what a run has left or exported.

    Parameters
    ----------
    form : {"adapter", "matrices", "merged", "gguf"}, optional
        What the target holds; by default an adapter as PEFT loads it, or the matrices alone, as it is.
    file : str
        Name of the GGUF file.
    personal : bool
        Every site has an adapter of its own.
    site : str
        The site whose own adapter it is.

    Raises
    ------
    RunError
        If the run cannot be read, or the card cannot be written.
    """
    config = settings_of(folder)
    usage = _usage(config, form=form or _form(target), file=file, personal=personal)
    return write_card(folder, target, usage, site=site)


def site_card(config: Config, target: Path, *, site: str) -> Path:
    """Write the model card of a site's own adapter, at the site.

    Parameters
    ----------
    config : Config
        The settings as the site trained with them.

    Raises
    ------
    RunError
        If it cannot be written.
    """
    return write_plain_card(config, target, _usage(config, form=_form(target), personal=True), site=site)


def known_labels(data: DataSettings) -> tuple[str, ...]:
    """Return the labels of a recipe in order; none where they are found in records, which are the sites'."""
    if data.task == "classify" and (data.labels or data.source in ("icd10", "mcc")):
        return public_labels(data)
    return ()


def _form(target: Path) -> Form:
    return "adapter" if (target / WEIGHTS_FILE).is_file() else "matrices"


def _usage(config: Config, *, form: Form, file: str = "", personal: bool = False) -> Usage:
    return Usage(
        form=form,
        file=file,
        personal=personal,
        embedded=config.model.name in EMBEDDED and not config.model.path,
        labels=known_labels(config.data),
        instruction=default_instruction(config.data),
    )
