"""Base models: the embedded ones, loading, shapes without weights, and fingerprints."""

import logging

# bitsandbytes warns at import when an optional CPU kernel is absent; its own code is used then.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
