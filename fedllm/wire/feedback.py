"""Error feedback: what a codec leaves out of one message goes into the next.

Sent: C(delta + memory); new memory: delta + memory - C(delta + memory). Over the rounds the messages
sum to the deltas, up to the last memory. Source: Seide et al. 2014; Karimireddy et al. 2019, algorithm 2
(arXiv 1901.09847).
"""

from __future__ import annotations

import numpy as np

from fedllm.adapters.state import AdapterState
from fedllm.errors import MismatchError
from fedllm.wire.codec import decode, encode


def encode_with_feedback(
    delta: AdapterState, memory: AdapterState | None, *, codec: str
) -> tuple[bytes, AdapterState]:
    """Serialise a change of the adapter together with what earlier messages left out.

    The memory never travels. Under a private policy ``delta`` is the noised update: what follows, the
    memory included, is post-processing and costs no further budget.

    Parameters
    ----------
    delta : AdapterState
        The change to send.
    memory : AdapterState or None
        What this function returned in the round before; None: nothing was left out.
    codec : str

    Returns
    -------
    payload : bytes
    memory : AdapterState
        For the next round; all zeros if the codec is lossless.

    Raises
    ------
    WireError
        If a number is not finite, or does not fit the codec's range.
    MismatchError
        If the memory is one of another adapter.
    ConfigError
        If there is no such codec.
    """
    if memory is None:
        memory = delta.zeros()
    if memory.spec != delta.spec or memory.layout != delta.layout:
        raise MismatchError("the error-feedback memory belongs to another adapter; start without one.")
    with np.errstate(over="ignore"):  # encode refuses infinity by name
        sums = {key: value + memory.tensors[key] for key, value in delta.tensors.items()}
    total = delta.with_tensors(sums)
    payload = encode(total, codec=codec)
    sent = decode(payload, spec=delta.spec, layout=delta.layout, codec=codec)
    left = {key: value - sent.tensors[key] for key, value in total.tensors.items()}
    return payload, delta.with_tensors(left)
