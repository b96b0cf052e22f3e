"""A short run of the frame fuzzer; the long one is started by hand, see its summary."""

from __future__ import annotations

from fuzz_frames import run


def test_mutated_frames_are_refused_or_read() -> None:
    result = run(inputs=2000, seed=0)

    assert result["outcomes"]["decoded"] > 50, "some inputs have to get through to the values"
    assert result["outcomes"]["FrameError"] > 500
    assert result["outcomes"]["FrameIntegrityError"] > 50
