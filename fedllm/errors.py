"""Errors that a person can act on: what is wrong, where, and what to do."""

from __future__ import annotations


class FedllmError(Exception):
    """Base of every error fedllm raises on purpose.

    The command line prints only the message; it never quotes a record's text.
    """


class ConfigError(FedllmError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(FedllmError):
    """A data file or data set cannot be used as the recipe asks."""


class ModelError(FedllmError):
    """A base model is missing, damaged or not what the run expects."""


class MismatchError(FedllmError):
    """Two adapter states (or a state and a model) do not belong together."""


class WireError(FedllmError):
    """A payload from another party is damaged, oversized or not finite."""


class PrivacyError(FedllmError):
    """The private path cannot be proven active, or the plan is not private.

    Parameters
    ----------
    message : str
        For the site's own people.
    public : str
        What others are told instead, where the message has numbers that follow from the records.
    """

    def __init__(self, message: str, *, public: str = "") -> None:
        super().__init__(message)
        self.public = public


class BudgetError(PrivacyError):
    """A site's policy forbids what was asked, or its budget does not cover it."""


class RunError(FedllmError):
    """A run folder, checkpoint or round cannot be used or completed."""


class DivergedError(RunError):
    """Training at a site ended in numbers that are not finite."""
