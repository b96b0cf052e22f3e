"""What frames cost: every figure is there, and a hand-over takes no second copy of the KV-cache."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

COMMAND = "from avp_agents.cli import app; app()"
OPTIONS = ("--megabytes", "40", "--repeats", "1", "--json")


@pytest.fixture(scope="module")
def figures() -> dict[str, float | None]:
    """Those of a KV-cache that is just large enough for memory of its own, in a process that does nothing else."""
    command = [sys.executable, "-c", COMMAND, "bench", "frames", *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {figure["name"]: figure["value"] for figure in json.loads(done.stdout)["figures"]}


def test_checksums_and_mac_have_rows_of_their_own(figures: dict[str, float | None]) -> None:
    """Beside memcpy, and encoding and decoding with and without the MAC over keys and values."""
    for name in (
        "memcpy", "encoded", "decoded", "encoded with the MAC over keys and values",
        "decoded with the MAC over keys and values", "checksums alone, one pass", "MAC alone, one pass",
    ):  # fmt: skip
        assert (figures[name] or 0) > 0


@pytest.mark.parametrize("way", ["assembled + decoded", "streamed into a reader + decoded"])
def test_a_hand_over_takes_the_memory_of_one_frame(figures: dict[str, float | None], way: str) -> None:
    """Where the system tells: what is decoded are views of the frame."""
    extra = figures[way]

    assert extra is None or 0.9 < extra <= 1.25
