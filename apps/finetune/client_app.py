"""Flower ClientApp: one site of a fedllm run."""

from fedllm.federation.client import client_app

app = client_app()
