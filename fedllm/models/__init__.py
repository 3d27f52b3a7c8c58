"""Base models: the embedded ones, loading, shapes without weights, fingerprints."""
