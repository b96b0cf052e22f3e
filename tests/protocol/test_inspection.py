"""What `inspect_frame` and the command line say of a frame, and how little they read to say it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from frame_samples import KEY

from avp_agents.context import Context
from avp_agents.errors import FrameError, FrameIntegrityError
from avp_agents.protocol import encode_context, inspect_frame
from avp_agents.protocol.frame_inspection import FileSource
from avp_agents.testing.contexts import FINGERPRINT, make_context


@pytest.fixture
def file(frame_bytes: bytearray, tmp_path: Path) -> Path:
    path = tmp_path / "context.avp"
    path.write_bytes(frame_bytes)
    return path


def test_what_a_frame_holds_is_said_without_reading_payloads(tmp_path: Path) -> None:
    path = tmp_path / "long.avp"
    with path.open("wb") as target:
        encode_context(make_context(tokens=4000, steps=2), key=KEY).write(target)

    report = inspect_frame(FileSource(path))

    assert report.bytes_read < path.stat().st_size / 100
    assert (report.authentic, report.verified) == (None, False)
    found = report.to_json()
    assert (found["kind"], found["positions"], found["layers"], found["fingerprint"]) == (
        "context",
        4002,
        2,
        FINGERPRINT,
    )
    kinds = ["tokens", "latents", "readout_hidden", "readout_tokens", "readout_probabilities", *["keys", "values"] * 2]
    assert [section["kind"] for section in found["sections"]] == kinds
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("authenticate", [True, False])
def test_the_macs_are_checked_with_a_key(context: Context, tmp_path: Path, authenticate: bool) -> None:
    path = tmp_path / "context.avp"
    with path.open("wb") as target:
        encode_context(context, key=KEY, authenticate_kv=authenticate).write(target)

    for verify in (False, True):
        assert inspect_frame(FileSource(path), key=KEY, verify=verify).authentic is True
        assert inspect_frame(FileSource(path), key=bytes(32), verify=verify).authentic is False


def test_damage_to_payloads_is_found_where_it_is_asked_for(file: Path, frame_bytes: bytearray) -> None:
    head_bytes = inspect_frame(FileSource(file)).layout.header.head_bytes
    frame_bytes[head_bytes] ^= 1
    file.write_bytes(frame_bytes)

    assert inspect_frame(FileSource(file)).verified is False
    with pytest.raises(FrameIntegrityError, match="section 5"):
        inspect_frame(FileSource(file), verify=True)


def test_an_altered_closing_mac_is_found_with_the_key(file: Path, frame_bytes: bytearray) -> None:
    frame_bytes[-1] ^= 1
    file.write_bytes(frame_bytes)

    assert inspect_frame(FileSource(file), key=KEY, verify=True).authentic is False


def test_torn_files_are_refused(file: Path, frame_bytes: bytearray) -> None:
    for length in (0, 10, 64, len(frame_bytes) - 1):
        file.write_bytes(frame_bytes[:length])
        with pytest.raises(FrameError):
            inspect_frame(FileSource(file))
