"""Contexts that came from outside the process are checked before any of their values reaches a batch.

A token id past the vocabulary or an embedding of another width would fail the forward pass, and with it all requests
that share the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from avp_agents.context import Context, LatentSegment, leaves
from avp_agents.errors import ConfigurationError, FingerprintMismatchError, IntegrityError
from avp_agents.kv_cache import HostKv


def check_fingerprint(context: Context, fingerprint: str, model: str) -> None:
    """Refuse a context of another model.

    Args:
        context: What came.
        fingerprint, model: Of the engine's model; the name is for the message.

    Raises:
        FingerprintMismatchError: It is one.
    """
    if context.fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"The context was made by model {context.fingerprint[:16]}, this engine runs {fingerprint[:16]} "
            f"({model}). Use the engine that made it, or hand its text over."
        )


def check_lineage(context: Context, *, tokens: int, hidden: int, dtype: str) -> None:
    """Refuse a lineage that a model of this shape cannot have made.

    Args:
        context: What came.
        tokens: Ids that the model knows.
        hidden: Width of its embeddings.
        dtype: Of its latent embeddings, by name.

    Raises:
        IntegrityError: The lineage is empty, a token id is unknown, or latent embeddings have another shape or dtype
            or are not finite.
    """
    if not len(context):
        raise IntegrityError("The context is empty; it starts with at least one token.")
    ids = np.asarray(context.token_ids(), dtype=np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < tokens:
        raise IntegrityError(f"The context has token ids outside of 0 to {tokens - 1}.")
    for segment in leaves(context.lineage):
        if not isinstance(segment, LatentSegment):
            continue
        found = segment.embeddings
        if found.dim() != 2 or found.shape[1] != hidden or found.dtype != getattr(torch, dtype, None):
            raise IntegrityError(
                f"Latent embeddings are [steps, {hidden}] in {dtype}, not {list(found.shape)} in {found.dtype}."
            )
        if not found.isfinite().all():
            raise IntegrityError("Latent embeddings are not finite.")


def check_kv(context: Context, check_shapes: Callable[[HostKv], None]) -> None:
    """Refuse a KV-cache on the host that cannot be the context's.

    Args:
        context: What came.
        check_shapes: Raises `ConfigurationError` for shapes and dtypes that are not the model's.

    Raises:
        IntegrityError: It has other shapes, another dtype or length, or is not finite.
    """
    kv = context.kv
    if not isinstance(kv, HostKv):
        return
    try:
        check_shapes(kv)
    except ConfigurationError as error:
        raise IntegrityError(str(error)) from error
    if not len(context) - 1 <= kv.length <= len(context):
        raise IntegrityError(f"The KV-cache has {kv.length} positions, the context {len(context)}.")
    if not all(bool(tensor.isfinite().all()) for pair in kv.layers for tensor in pair):
        raise IntegrityError("The KV-cache holds NaN or Inf.")
