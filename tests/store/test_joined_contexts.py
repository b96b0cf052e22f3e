"""Joined contexts come back from a disk as they were put: splices within splices, and where thoughts come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from avp_agents import Context, DiskStore, LatentSegment, MemoryStore, Namespace, TokenSegment
from avp_agents.context import LatentRecipe, Segment, SplicedSegment, leaves
from avp_agents.lineage import same_values

TENANT = Namespace("tests", b"k" * 32)
RECIPE = LatentRecipe("soft", 256, 1.0, False, 2)


def thought(seed: int, origin: str | None = None) -> LatentSegment:
    return LatentSegment(torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)), RECIPE, origin)


def joined(*tail: Segment) -> Context:
    return Context("f" * 64, "float32", (TokenSegment((1, 2, 3)), thought(0), TokenSegment((9,)), *tail))


INNER = SplicedSegment((TokenSegment((4,)), thought(1)), prefix=2)
SPLICED = joined(SplicedSegment((TokenSegment((5, 6)), thought(2), INNER), prefix=3), TokenSegment((9,)))


def test_splices_come_back_bit_for_bit(tmp_path: Path) -> None:
    handle = DiskStore(tmp_path, namespace=TENANT).put(SPLICED)
    found = DiskStore(tmp_path, namespace=TENANT).get(handle)

    assert found.recipe_ids == SPLICED.recipe_ids
    assert same_values(found, SPLICED)
    assert [type(leaf) for leaf in leaves(found.lineage)] == [type(leaf) for leaf in leaves(SPLICED.lineage)]
    assert (len(found), found.latent_steps, found.token_ids()) == (len(SPLICED), 6, (1, 2, 3, 9, 5, 6, 4, 9))


def test_where_a_thought_comes_from_is_kept(tmp_path: Path) -> None:
    context = joined(thought(1, origin="a" * 64))
    found = DiskStore(tmp_path, namespace=TENANT).get(DiskStore(tmp_path, namespace=TENANT).put(context))
    latent = found.lineage[-1]

    assert isinstance(latent, LatentSegment)
    assert latent.origin == "a" * 64
    assert found.recipe_id == context.recipe_id


def test_every_way_to_join_is_another_context() -> None:
    ways: list[tuple[Segment, ...]] = [
        (TokenSegment((4,)), thought(1)),
        (TokenSegment((4,)), thought(1, origin="a")),
        (TokenSegment((4,)), thought(1, origin="b")),
        (INNER,),
        (replace(INNER, prefix=1),),
        (SplicedSegment((INNER,), prefix=2),),
    ]

    assert len({joined(*way).recipe_id for way in ways}) == len(ways)


def test_values_within_splices_count() -> None:
    """The first writer's values win, so a KV-cache of other values is not taken."""
    store = MemoryStore(namespace=TENANT)
    store.put(joined(INNER))
    other = joined(SplicedSegment((TokenSegment((4,)), thought(7)), prefix=2))

    assert other.recipe_id == joined(INNER).recipe_id
    assert not same_values(other, joined(INNER))
    assert same_values(store.get(store.put(other)), joined(INNER))
