"""Pure functions on adapter states."""

from fedllm.aggregation.average import weighted_mean

__all__ = ["weighted_mean"]
