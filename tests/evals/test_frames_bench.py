"""What frames cost: every figure is there, and a hand-over takes no second copy of the KV-cache."""

from __future__ import annotations

import pytest

from avp_agents.evals import frames


@pytest.fixture(scope="module")
def figures() -> list[frames.Figure]:
    """Those of a KV-cache that is just large enough for memory of its own."""
    return frames.measure(40, repeats=1, sdk_python=None)


def test_checksums_and_mac_have_rows_of_their_own(figures: list[frames.Figure]) -> None:
    """Beside memcpy, and encoding and decoding with and without the MAC over keys and values."""
    speed = {figure.name: figure.value or 0 for figure in figures if figure.group.endswith("bfloat16")}

    for name in (
        "memcpy", "encoded", "decoded", "encoded with the MAC over keys and values",
        "decoded with the MAC over keys and values", "checksums alone, one pass", "MAC alone, one pass",
    ):  # fmt: skip
        assert speed[name] > 0


@pytest.mark.parametrize("way", ["assembled + decoded", "streamed into a reader + decoded"])
def test_a_hand_over_takes_the_memory_of_one_frame(figures: list[frames.Figure], way: str) -> None:
    """Where the system tells: what is decoded are views of the frame."""
    (extra,) = (figure.value for figure in figures if figure.name == way)

    assert extra is None or 0.9 < extra <= 1.25
