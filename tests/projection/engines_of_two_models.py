"""Engines of other weights, dtypes and settings in one process, as the projection's tests use them."""

from __future__ import annotations

from dataclasses import dataclass

from avp_agents import LatentEngine


@dataclass(frozen=True)
class Engines:
    """Engines of one process, on one store.

    Attributes:
        source: The one that thinks.
        target: Other weights and sizes, as engines are by default.
        projecting: As `target`, with vectors.
        other_dtype: The source's weights in another dtype.
    """

    source: LatentEngine
    target: LatentEngine
    projecting: LatentEngine
    other_dtype: LatentEngine
