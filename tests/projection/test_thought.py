"""What crosses between models: small, exact enough, and checked on arrival."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp_agents.crossing import ByteDistribution, SpokenMessage, Thought
from avp_agents.errors import ProjectionError

DISTRIBUTION = ByteDistribution((b" the", b"\n", b"\xc3"), (0.5, 0.25, 0.125))
THOUGHT = Thought("a" * 64, "b" * 64, (DISTRIBUTION,), (SpokenMessage("user", "Wie heißt es?"),))


def fields(**changes: Any) -> bytes:
    """The encoded thought with other fields."""
    return msgpack.packb(msgpack.unpackb(THOUGHT.encode()) | changes)  # pyright: ignore[reportReturnType]


def test_a_round_trip_changes_nothing() -> None:
    """Bytes of all kinds, probabilities that float16 holds, texts in any language."""
    assert Thought.decode(THOUGHT.encode()) == THOUGHT


def test_a_full_distribution_takes_about_two_kilobytes() -> None:
    """256 tokens of an ordinary vocabulary."""
    pieces = tuple(b" tok%d" % i for i in range(256))
    thought = Thought("a" * 64, "b" * 64, (ByteDistribution(pieces, (1 / 256,) * 256),))

    assert 1500 < len(thought.encode()) < 3000
    assert Thought.decode(thought.encode()).distributions[0].pieces == pieces


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\xc1",
        THOUGHT.encode()[:-1],
        THOUGHT.encode() + b"\x00",
        msgpack.packb([1, 2]),
        msgpack.packb({"v": 1}),
        fields(v=2),
        fields(more=1),
        fields(origin="../../etc"),
        fields(fingerprint=7),
        fields(distributions=[[b"\x01", b"a", b"\x00\x3c"]] * 65),
        fields(distributions=[[b"\x02", b"a", b"\x00\x3c"]]),
        fields(distributions=[[b"\x00", b"", b"\x00\x3c"]]),
        fields(distributions=[[b"\x01", b"a", b"\x00\x3c\x00"]]),
        fields(distributions=[[b"\x01", b"a", b"\x00\x7c"]]),
        fields(distributions=[[b"\x01", b"a", b"\x00\xb8"]]),
        fields(distributions=[[b"\x01\x01", b"ab", b"\x00\x3c\x00\x3c"]]),
        fields(distributions=[[b"\x01" * 300, b"a" * 300, bytes(600)]]),
        fields(distributions=[["a", b"a", b""]]),
        fields(messages=[["wizard", "text"]]),
        fields(messages=[["user", b"text"]]),
        fields(messages=[["user"]]),
        fields(messages={"user": "text"}),
        fields(messages=[["user", "x"]] * 1025),
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc9\x00\x00\x00\x01\x05\x00",
    ],
    ids=range(27),
)
def test_what_is_not_well_formed_is_refused(damaged: bytes) -> None:
    """Torn, surplus, unknown, oversized, negative, infinite, or of other types."""
    with pytest.raises(ProjectionError):
        Thought.decode(damaged)


def test_size_is_checked_before_anything_else() -> None:
    """Too large a thought is neither made nor read."""
    huge = Thought("a" * 64, "b" * 64, (), (SpokenMessage("user", "x" * 2**24),))
    with pytest.raises(ProjectionError, match="bytes"):
        huge.encode()
    with pytest.raises(ProjectionError, match="bytes"):
        Thought.decode(bytes(2**24 + 1))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.tuples(st.integers(0, 200), st.binary(max_size=4)))
def test_no_input_escapes_as_another_error(noise: bytes | tuple[int, bytes]) -> None:
    """Random bytes, and a thought with some bytes replaced: read, or a ProjectionError."""
    good = THOUGHT.encode()
    data = noise if isinstance(noise, bytes) else good[: noise[0]] + noise[1] + good[noise[0] + len(noise[1]) :]
    with contextlib.suppress(ProjectionError):
        Thought.decode(data)
