"""Who uses which segment, and what goes first. A lineage is written root first: "abc" is c after b after a."""

from __future__ import annotations

from itertools import pairwise

from avp_agents.store.references import References, StoredHandle

LINEAGE_BYTES, KV_BYTES = 1, 10


def census(*lineages: str, pinned: str = "", orphans: str = "", torn: str = "") -> References[StoredHandle]:
    """A store with one handle per lineage, named like it, used in this order; every segment has a KV file."""
    chains = [*lineages, orphans]
    parents = {b: a for chain in chains for a, b in pairwise(chain)}
    segments = {segment for chain in chains for segment in chain if segment not in torn}
    handles = {chain: StoredHandle(chain[-1], float(use), chain == pinned) for use, chain in enumerate(lineages)}
    return References(
        handles,
        {segment: parents.get(segment) for segment in segments},
        dict.fromkeys(segments, LINEAGE_BYTES),
        dict.fromkeys(segments, KV_BYTES),
        torn,
    )


def test_a_handle_takes_along_what_only_it_uses() -> None:
    found = census("abc", "abd")

    assert found.used_only_by("abc") == ["c"]
    found.release("abc")

    assert found.removals.segments == ["c"]
    assert found.used_only_by("abd") == ["d", "b", "a"]


def test_a_handle_in_the_middle_takes_nothing_along() -> None:
    found = census("ab", "abc")

    found.release("ab")

    assert found.removals.segments == []
    assert found.used_only_by("abc") == ["c", "b", "a"]


def test_two_handles_of_one_segment_both_use_it() -> None:
    found = References(
        {"one": StoredHandle("a", 0, False), "two": StoredHandle("a", 1, False)}, {"a": None}, {"a": 1}, {"a": 10}
    )

    found.release("one")
    assert found.removals.segments == []

    found.release("two")
    assert found.removals.segments == ["a"]


def test_orphans_go_followers_first() -> None:
    found = census("ab", orphans="axyz")

    found.release_orphans()

    assert found.removals.segments == ["z", "y", "x"]


def test_kv_without_a_segment_is_an_orphan() -> None:
    found = References({}, {}, {}, {"a": 10})

    found.release_orphans()

    assert (found.removals.kv, found.removals.kv_bytes) == (["a"], 10)


def test_a_torn_segment_makes_its_handles_incomplete() -> None:
    found = census("abc", "ad", torn="b")

    assert not found.is_whole("abc")
    assert found.is_whole("ad")
    found.release_orphans()
    assert found.removals.segments == ["b"]


def test_a_handle_without_any_segment_is_incomplete() -> None:
    assert not census("a", torn="a").is_whole("a")


def test_idle_kv_goes_least_recently_used_first_and_ends_first() -> None:
    found = census("abc", "abd")

    found.shrink(3 * KV_BYTES)

    assert found.removals.kv == ["c", "d", "b"]
    assert found.removals.handles == []


def test_pinned_and_wanted_kv_stays() -> None:
    found = census("ab", "cd", "ef", pinned="ab")
    found.want("ef")

    lacking = found.shrink(100, kv_only=True)

    assert found.removals.kv == ["d", "c"]
    assert lacking == 100 - 2 * KV_BYTES


def test_when_kv_does_not_suffice_handles_go() -> None:
    found = census("ab", "cd", "ef", pinned="cd")

    lacking = found.shrink(found.total, spare="ef")

    assert found.removals.handles == ["ab"]
    assert lacking == 2 * (LINEAGE_BYTES + KV_BYTES) + 2 * LINEAGE_BYTES
    assert found.total == lacking


def test_what_is_wanted_is_not_unused() -> None:
    found = census("ab")
    found.want("abc")

    found.release("ab")

    assert found.removals.segments == []


def test_a_handle_that_frees_nothing_goes_after_those_that_do() -> None:
    found = census("ab", "abc", "xy")

    found.shrink(5 * KV_BYTES + LINEAGE_BYTES)

    assert found.removals.handles == ["abc"]


def test_two_handles_of_one_segment_go_when_nothing_else_can() -> None:
    found = References(
        {"one": StoredHandle("a", 0, False), "two": StoredHandle("a", 1, False)}, {"a": None}, {"a": 1}, {"a": 10}
    )

    assert found.shrink(11) == 0
    assert found.removals.handles == ["one", "two"]
