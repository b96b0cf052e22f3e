"""Contexts made of random numbers, for tests that need neither an engine nor a model."""

from __future__ import annotations

from typing import Any

import torch

from avp_agents.context import Context, LatentRecipe, LatentSegment, Readout, Segment, TokenSegment
from avp_agents.kv_cache import HostKv

FINGERPRINT = "00c0ffee" * 8
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 8
HIDDEN = 16
TOP_K = 5


def make_context(
    *,
    parent: Context | None = None,
    seed: int = 0,
    values: int = 0,
    tokens: int = 12,
    steps: int = 4,
    dtype: str = "float32",
    kv_short: int | None = 0,
    hidden: int = HIDDEN,
    head_dim: int = HEAD_DIM,
) -> Context:
    """A context with consistent lengths: token ids, then latent steps with a readout, and a KV-cache over both.

    Args:
        parent: The context to extend; its segments and the KV of its positions are taken over.
        seed: What distinguishes one recipe from another; it decides the token ids.
        values: What distinguishes two runs of one recipe; it decides latents, readout and KV.
        tokens: Token ids of the new segment.
        steps: Latent steps after them; 0 leaves latents and readout out.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        kv_short: By how many positions the KV-cache is shorter than the lineage; None makes no KV-cache.
        hidden: The model's width.
        head_dim: Width of a KV head.
    """
    floats = getattr(torch, dtype)
    ids = torch.Generator().manual_seed(seed)
    numbers = torch.Generator().manual_seed(1000 * seed + values)
    lineage: list[Segment] = list(parent.lineage) if parent is not None else []
    lineage.append(TokenSegment(tuple(torch.randint(0, 32000, (tokens,), generator=ids).tolist())))
    readout = None
    if steps:
        recipe = LatentRecipe(method="soft", k=256, temperature=1.0, renormalise=False, steps=steps)
        lineage.append(LatentSegment(torch.randn(steps, hidden, generator=numbers).to(floats), recipe))
        readout = Readout(
            hidden=torch.randn(hidden, generator=numbers).to(floats),
            token_ids=torch.randint(0, 32000, (TOP_K,), generator=numbers),
            probabilities=torch.rand(TOP_K, generator=numbers).sort(descending=True).values,
        )
    context = Context(FINGERPRINT, dtype, tuple(lineage), readout)
    if kv_short is not None:
        whole = _random_kv(context, values, head_dim)
        if parent is not None and parent.kv is not None:
            for (keys, vals), (own_keys, own_vals) in zip(parent.kv.to_host().layers, whole.layers, strict=True):
                own_keys[:, : parent.kv_len] = keys
                own_vals[:, : parent.kv_len] = vals
        context.attach(kv=whole.to_host(0, len(context) - kv_short))
    return context


def _random_kv(context: Context, values: int, head_dim: int) -> HostKv:
    """Keys and values that depend, like real ones, on nothing but the lineage up to their position (and the run)."""
    pieces = []
    for recipe_id, segment in zip(context.recipe_ids, context.lineage, strict=True):
        numbers = torch.Generator().manual_seed(int(recipe_id[:12], 16) + values)
        pieces.append(torch.randn(2 * LAYERS, KV_HEADS, len(segment), head_dim, generator=numbers))
    tensors = torch.cat(pieces, dim=2).to(getattr(torch, context.dtype))
    return HostKv(tuple((tensors[2 * layer], tensors[2 * layer + 1]) for layer in range(LAYERS)))


def thread_of(turns: int, **options: Any) -> list[Context]:
    """A conversation: each context extends the one before, whose last token has no KV yet."""
    contexts: list[Context] = []
    for turn in range(turns):
        parent = contexts[-1] if contexts else None
        contexts.append(make_context(parent=parent, seed=turn, steps=0, kv_short=1, **options))
    return contexts


def assert_same_lineage(found: Context, expected: Context) -> None:
    """The same recipe, and values that agree bit for bit."""
    assert found.recipe_ids == expected.recipe_ids, "a stored context must come back with the recipe it was put with"
    for one, other in zip(found.lineage, expected.lineage, strict=True):
        if isinstance(other, LatentSegment):
            assert isinstance(one, LatentSegment), "a latent segment must come back as one"
            assert_same_bits(one.embeddings, other.embeddings, "latent embeddings")
            assert one.recipe == other.recipe, "a latent recipe must come back field for field"
    assert (found.readout is None) == (expected.readout is None), "a readout must come back if one was put"
    if found.readout is not None and expected.readout is not None:
        assert_same_bits(found.readout.hidden, expected.readout.hidden, "the readout's hidden state")
        assert_same_bits(found.readout.token_ids, expected.readout.token_ids, "the readout's token ids")
        assert_same_bits(found.readout.probabilities, expected.readout.probabilities, "the readout's probabilities")


def assert_same_kv(found: Context, expected: Context) -> None:
    """The same KV-cache, bit for bit, or none on either side."""
    assert found.kv_len == expected.kv_len, "a KV-cache must come back with the positions it was put with"
    if found.kv is not None and expected.kv is not None:
        pairs = zip(found.kv.to_host().layers, expected.kv.to_host().layers, strict=True)
        for (keys, values), (expected_keys, expected_values) in pairs:
            assert_same_bits(keys, expected_keys, "keys")
            assert_same_bits(values, expected_values, "values")


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal dtype, shape and bytes."""
    assert found.dtype == expected.dtype, f"{what} must keep their dtype"
    assert found.shape == expected.shape, f"{what} must keep their shape"
    same = torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    assert same, f"{what} must come back bit for bit"
