"""Which rows of a pass of single positions share one strided view of the pool."""

from __future__ import annotations

import torch

from avp_agents.engine.core.attention import Layout, Row

POOL = torch.arange(2 * 200, dtype=torch.float32).reshape(1, 2, 200, 1)


def spaced(*places: tuple[int, int], window: int | None = None, realign: bool = False) -> list[tuple[int, int]]:
    """`(first, count)` of the views for rows at `(base, length)`; each view is checked against its rows."""
    rows = tuple(Row(index, 1, base, length) for index, (base, length) in enumerate(places))
    layout = Layout(torch.empty(0), rows, realign=realign)
    views = layout.spaced(window, POOL)
    for view in views:
        shown = view.view(POOL)
        for index, row in enumerate(rows[view.first : view.first + view.count]):
            seen = row.length if window is None else min(row.length, window)
            end = row.base + row.length
            torch.testing.assert_close(shown[index, :, :seen], POOL[0, :, end - seen : end])
            assert view.mask is not None or seen == view.span
            if view.mask is not None:
                assert (view.mask[index, 0, 0] == 0).sum() == seen
    return [(view.first, view.count) for view in views]


def test_rows_at_equal_distances_are_one_view() -> None:
    assert spaced((0, 10), (32, 12), (64, 7)) == [(0, 3)]


def test_two_rows_are_always_at_equal_distances() -> None:
    assert spaced((0, 10), (48, 12), (64, 7), (160, 3)) == [(0, 2), (2, 2)]


def test_a_view_never_reaches_into_the_keys_of_another_row() -> None:
    """The first row is longer than the distance that the others keep; behind the last one the pool ends."""
    assert spaced((0, 40), (48, 5), (64, 30)) == [(0, 1), (1, 1), (2, 1)]
    assert spaced((100, 40), (180, 5)) == [(0, 1), (1, 1)]


def test_a_sliding_window_moves_the_starts() -> None:
    """With 8 visible keys, rows of unequal lengths at equal distances are unequally spaced."""
    assert spaced((0, 20), (32, 21), (64, 20), window=8) == [(0, 2), (2, 1)]
    assert spaced((0, 20), (32, 20), (64, 20), window=8) == [(0, 3)]


def test_batch_invariance_reads_every_row_by_itself() -> None:
    assert spaced((0, 10), (32, 12), realign=True) == [(0, 1), (1, 1)]
