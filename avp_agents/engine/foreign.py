"""Contexts that came from outside the process: their values are checked before any of them reaches a batch.

A token id past the vocabulary or an embedding of another width would fail the forward pass, and with it all requests
that share the batch.
"""

from __future__ import annotations

import numpy as np

from avp_agents.context import Context, LatentSegment, leaves
from avp_agents.engine.kv_pool import KvPool
from avp_agents.engine.loading import LoadedModel
from avp_agents.errors import ConfigurationError, IntegrityError
from avp_agents.kv_cache import HostKv


def check_values(context: Context, loaded: LoadedModel, pool: KvPool) -> None:
    """Refuse values that this model cannot have made. Whether the fingerprint fits was checked before.

    Raises:
        IntegrityError: The lineage is empty, a token id is unknown, latent embeddings or the KV-cache have another
            shape or dtype, or values are not finite.
    """
    if not len(context):
        raise IntegrityError("The context is empty; it starts with at least one token.")
    ids = np.asarray(context.token_ids(), dtype=np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < loaded.vocabulary.size:
        raise IntegrityError(f"The context has token ids outside of 0 to {loaded.vocabulary.size - 1}.")
    for segment in leaves(context.lineage):
        if isinstance(segment, LatentSegment):
            _check_latents(segment, loaded)
    kv = context.kv
    if isinstance(kv, HostKv):
        _check_kv(kv, context, pool)


def _check_latents(segment: LatentSegment, loaded: LoadedModel) -> None:
    found, hidden = segment.embeddings, loaded.vocabulary.rows(0, 1).shape[-1]
    if found.dim() != 2 or found.shape[1] != hidden or found.dtype != loaded.dtype:
        raise IntegrityError(
            f"Latent embeddings are [steps, {hidden}] in {loaded.dtype_name}, not {list(found.shape)} in {found.dtype}."
        )
    if not found.isfinite().all():
        raise IntegrityError("Latent embeddings are not finite.")


def _check_kv(kv: HostKv, context: Context, pool: KvPool) -> None:
    try:
        pool.check(kv)
    except ConfigurationError as error:
        raise IntegrityError(str(error)) from error
    if not len(context) - 1 <= kv.length <= len(context):
        raise IntegrityError(f"The KV-cache has {kv.length} positions, the context {len(context)}.")
    if not all(bool(tensor.isfinite().all()) for pair in kv.layers for tensor in pair):
        raise IntegrityError("The KV-cache holds NaN or Inf.")
