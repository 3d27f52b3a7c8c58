"""What attacks on gradients share: a session to attack, row spans, and the inputs held against them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedllm.config import Config
from fedllm.data.encode import Encoded
from fedllm.privacy.entropy import SecureGenerator
from fedllm.privacy.plan import PrivacyPlan
from fedllm.training.session import Session, open_session
from fedllm.training.spec import adapter_spec, basis_from_seed
from fedllm.training.steps import of_units, private_release, record_gradients

_CHUNK = 2048
Rows = npt.NDArray[np.float64]


class _Reached(Exception):
    """The forward pass has reached the map that is looked at."""


def prepared(config: Config) -> Session:
    """Return a session whose factors are not zero, as after some rounds."""
    spec = adapter_spec(config)
    basis = basis_from_seed(spec)
    assert basis is not None, "seeded adapters only"
    session = open_session(config, spec, basis)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in session.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=source).to(parameter))
    return session


def released(session: Session, record: Encoded, plan: PrivacyPlan) -> Mapping[str, Tensor]:
    """Return the privatised gradient of a step that takes one record."""
    return private_release(
        {key: value.shape for key, value in session.parameters.items()},
        [[record]],
        gradients_of=of_units(partial(record_gradients, session, session.parameters)),
        plan=plan,
        generator=SecureGenerator(),
        micro_batch=1,
    )


def row_span(gradient: Tensor) -> Rows:
    """Return an orthonormal basis of a gradient's row span, shape (k, in), k at most its rank."""
    _, values, rows = np.linalg.svd(gradient.double().numpy(), full_matrices=False)
    found: Rows = rows[values > 1e-6 * values[0]]
    return found


def distances(span: Rows, table: Rows) -> Rows:
    """Return the sine of the angle between a span and each row of a table, shape (n,)."""
    sizes = np.linalg.norm(table, axis=1)
    inside = np.linalg.norm(table @ span.T, axis=1)
    found: Rows = np.sqrt(np.maximum(0.0, 1 - (inside / np.maximum(sizes, 1e-12)) ** 2))
    return found


def last_inputs(session: Session, module: str, ids: Tensor) -> Rows:
    """Return what an adapted map gets at the last position of each sequence.

    Parameters
    ----------
    module : str
        The map's path.
    ids : Tensor
        Token ids, shape (n, T).

    Returns
    -------
    ndarray
        Shape (n, in), float64.
    """
    (layer,) = (part for name, part in session.model.named_modules() if name.endswith(f"{module}.base_layer"))
    held: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        held.append(inputs[0].detach()[:, -1])
        raise _Reached

    hook = layer.register_forward_pre_hook(keep)
    try:
        for chunk in torch.split(ids.to(session.base.device), _CHUNK):
            # the rest of the model is of no interest
            with torch.no_grad(), suppress(_Reached):
                session.base.get_decoder()(input_ids=chunk, use_cache=False)
    finally:
        hook.remove()
    found: Rows = torch.cat(held).double().cpu().numpy()
    return found


def inputs_of_tokens(session: Session, module: str) -> Rows:
    """Return what every token of the vocabulary gives a map of the lowest layer, shape (V, in)."""
    vocabulary = int(session.base.config.get_text_config().vocab_size)
    return last_inputs(session, module, torch.arange(vocabulary)[:, None])
