"""Comparing what two contexts of one recipe hold."""

from __future__ import annotations

from avp_agents.context import Context, LatentSegment, leaves


def same_values(one: Context, other: Context) -> bool:
    """Whether two contexts of the same recipe hold the same latent values, bit for bit.

    Runs of one recipe may differ in their last bits. A KV-cache belongs to the values it was computed from.
    """
    pairs = zip(leaves(one.lineage), leaves(other.lineage), strict=True)
    return all(a is b or _same_latents(a, b) for a, b in pairs if isinstance(a, LatentSegment))


def _same_latents(one: LatentSegment, other: object) -> bool:
    return isinstance(other, LatentSegment) and one.embeddings.equal(other.embeddings)


def without_kv(context: Context) -> Context:
    """The same value without a KV-cache, under the same handle."""
    twin = Context(context.fingerprint, context.dtype, context.lineage, context.readout)
    twin.attach(handle=context.handle)
    return twin
