"""Papers' methods as presets of adapter averaging."""

from __future__ import annotations

from strategies.base import AdapterAveraging


class FedSB(AdapterAveraging):
    """Fed-SB (arXiv 2502.15436): average R of ``W0 + s B R A``; exact, since B and A are frozen."""

    methods = ("fed-sb",)


class FedIT(AdapterAveraging):
    """FedIT (arXiv 2305.05644): average LoRA's A and B separately; not exact in the product B A."""

    methods = ("lora",)


class FFALoRA(AdapterAveraging):
    """FFA-LoRA (arXiv 2403.12313): average B with A frozen; exact."""

    methods = ("ffa",)
