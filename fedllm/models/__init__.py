"""Base models: the embedded ones, loading, shapes without weights, and fingerprints."""

import logging

# bitsandbytes warns of an absent optional CPU kernel, and at every 8-bit product of its input's cast.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
