"""Two sides compare what they are, and every handoff gets the cheapest mode that both can do.

``AVP_FUZZ_EXAMPLES`` sets how many malformed hellos are tried.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp_agents.errors import HandshakeError
from avp_agents.protocol.handshake import (
    IN_PROCESS,
    MODES,
    SKETCH_SIZE,
    Hello,
    Link,
    LinkMeter,
    Shipment,
    VocabularySketch,
    handshake,
)

LARGE = VocabularySketch("1" * 64, 4000, tuple(range(0, 1000 * SKETCH_SIZE, 1000)))
FOREIGN = VocabularySketch("2" * 64, 4000, tuple(range(7, 1000 * SKETCH_SIZE, 1000)))
HALF = VocabularySketch("3" * 64, 2000, tuple(sorted({*range(0, 300_000, 2000), *range(7, 724_000, 2000)})))
SOURCE = Hello("a" * 64, "bfloat16", LARGE, prefill_rate=500.0, model="org/source")
SHIPMENT = Shipment(positions=320, lineage_bytes=40_000, kv_bytes=12_000_000)
MBIT = 125_000.0


def other(**changes: Any) -> Hello:
    """Another model's side."""
    return replace(SOURCE, fingerprint="b" * 64, model="org/other", **changes)


def test_the_same_model_in_one_process_shares_its_kv_cache() -> None:
    """Nothing moves, so nothing is quicker."""
    decision = handshake(SOURCE, SOURCE).choose(SHIPMENT, IN_PROCESS)

    assert decision.mode == "kv"
    assert dict(decision.estimates) == {"kv": 0.0, "replay": pytest.approx(0.64)}
    assert decision.to_metadata()["estimated_ms"] == {"kv": 0.0, "replay": 640.0}


@pytest.mark.parametrize(("mbit", "mode"), [(10_000, "kv"), (10, "replay")])
def test_the_link_decides_between_moving_and_rebuilding(mbit: float, mode: str) -> None:
    """12 MB of KV-cache against 40 kB of lineage and a prefill of 0.64 s."""
    decision = handshake(SOURCE, SOURCE).choose(SHIPMENT, Link(mbit * MBIT, 0.01))

    assert decision.mode == mode


def test_the_switch_lies_where_both_take_equally_long() -> None:
    """(kv_bytes - lineage_bytes) / throughput = positions / prefill rate."""
    crossover = (12_000_000 - 40_000) / (320 / 500.0)
    shaken = handshake(SOURCE, SOURCE)

    assert shaken.choose(SHIPMENT, Link(1.01 * crossover, 0.05)).mode == "kv"
    assert shaken.choose(SHIPMENT, Link(0.99 * crossover, 0.05)).mode == "replay"


def test_a_kv_cache_is_not_there_before_it_is_checked() -> None:
    """What the target takes to check it and take it in counts like the way to it."""
    shaken, fast = handshake(SOURCE, SOURCE), Link(100 * 12_000_000)

    assert shaken.choose(replace(SHIPMENT, intake_seconds=0.5), fast).mode == "kv"
    assert shaken.choose(replace(SHIPMENT, intake_seconds=0.7), fast).mode == "replay"


@pytest.mark.parametrize(
    ("target", "shipment", "mode", "why"),
    [
        (SOURCE, replace(SHIPMENT, kv_bytes=None), "replay", "no KV-cache is left"),
        (replace(SOURCE, dtype="float32"), SHIPMENT, "replay", "another dtype"),
        (replace(SOURCE, prefill_rate=None), SHIPMENT, "kv", "not known yet"),
        (replace(SOURCE, modes=("kv", "text")), SHIPMENT, "kv", "no replay"),
        (replace(SOURCE, modes=("text",)), SHIPMENT, "text", "no mode that moves a context"),
        (replace(SOURCE, modes=("text",), dtype="float32"), SHIPMENT, "text", "no mode that moves a context"),
        (other(), SHIPMENT, "projection", "100% of the smaller vocabulary"),
        (other(vocabulary=FOREIGN), SHIPMENT, "text", "only 0%"),
        (other(modes=("kv", "text")), SHIPMENT, "text", "not both sides offer projection"),
    ],
)
def test_each_rung_says_why(target: Hello, shipment: Shipment, mode: str, why: str) -> None:
    """The reason names what ruled better modes out."""
    decision = handshake(SOURCE, target).choose(shipment, Link(10 * MBIT))

    assert decision.mode == mode
    assert why in decision.reason.replace("not both sides offer a replay", "no replay")


def test_sides_without_a_common_mode_are_told_so() -> None:
    """Both are named, with what each offers."""
    with pytest.raises(HandshakeError, match=r"org/source and org/other .*\(kv, replay, projection, text / kv\)"):
        handshake(SOURCE, other(modes=("kv",))).choose(SHIPMENT)


def test_the_sketch_is_a_sample_of_the_smaller_vocabulary() -> None:
    """Of the hashes that both sketches cover, so many of the smaller side's are the other one's."""
    assert LARGE.overlap(LARGE) == 1.0
    assert LARGE.overlap(FOREIGN) == 0.0
    assert LARGE.overlap(HALF) == HALF.overlap(LARGE) == pytest.approx(0.37, abs=0.02)


def test_a_pair_is_compared_once() -> None:
    """The same two hellos, also from two connections, give the same object."""
    again = Hello.from_wire(json.loads(json.dumps(SOURCE.to_wire())))

    assert again == SOURCE
    assert handshake(SOURCE, other()) is handshake(again, other())


def test_a_hello_is_small_json() -> None:
    """It fits into one packet or two of any transport, and names no path."""
    assert len(json.dumps(SOURCE.to_wire())) < 4096


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"fingerprint": "xyz"},
        {"fingerprint": 12},
        {"dtype": "int8"},
        {"modes": "kv"},
        {"modes": ["kv"] * 17},
        {"prefill_rate": -1.0},
        {"prefill_rate": True},
        {"prefill_rate": float("nan")},
        {"model": "m" * 257},
        {"vocabulary": None},
        {"vocabulary": {"digest": "1" * 64, "size": -1, "lowest": ""}},
        {"vocabulary": {"digest": "1" * 64, "size": 5, "lowest": "!"}},
        {"vocabulary": {"digest": "1" * 64, "size": 5, "lowest": "AAAA"}},
        {"vocabulary": {"digest": "1" * 64, "size": 1, "lowest": "AAAAAAEAAAA="}},
        {"vocabulary": {"digest": "1" * 64, "size": 2, "lowest": "AQAAAAAAAAA="}},
        {"vocabulary": {"digest": "1" * 64, "size": 5, "lowest": "A" * 9000}},
        {"vocabulary": {"digest": "", "size": 1, "lowest": "AAAAAA=="}},
    ],
)
def test_a_malformed_hello_is_refused(changes: dict[str, Any]) -> None:
    """Wrong version, types, ranges and sizes."""
    with pytest.raises(HandshakeError):
        Hello.from_wire(SOURCE.to_wire() | changes)


def test_modes_of_later_releases_are_passed_over() -> None:
    """What this side does not know it cannot use."""
    wire = SOURCE.to_wire() | {"modes": ["telepathy", "text", "kv"]}

    assert Hello.from_wire(wire).modes == ("kv", "text")
    assert MODES == ("kv", "replay", "projection", "text")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=int(os.environ.get("AVP_FUZZ_EXAMPLES", "300")), deadline=None)
@given(st.one_of(_JSON, st.tuples(st.sampled_from(sorted(SOURCE.to_wire())), _JSON)))
def test_no_input_escapes_as_another_error(given_data: Any) -> None:
    """Any JSON data, and a hello with any JSON in one of its fields."""
    data = SOURCE.to_wire() | {given_data[0]: given_data[1]} if isinstance(given_data, tuple) else given_data
    with contextlib.suppress(HandshakeError):
        Hello.from_wire(data)


def test_a_link_is_learnt_from_transfers() -> None:
    """Small ones show the latency, large ones the throughput beyond it; one slow transfer does not change it."""
    meter = LinkMeter()
    meter.note(200, 0.02)
    assert meter.link is None
    for seconds in (0.12, 0.12, 5.0):
        meter.note(1_000_000, seconds)
    meter.note(100, 0.03)
    meter.note(10**6, math.inf)

    link = meter.link
    assert link is not None
    assert link.latency_seconds == 0.02
    assert link.bytes_per_second == pytest.approx(10_000_000)


def test_what_buffers_let_through_at_once_does_not_count() -> None:
    """Short transfers may be over before a link's limit is felt; a longer one outweighs them."""
    meter = LinkMeter()
    for size, seconds in ((100, 0.001), (2**16, 0.0011), (2**18, 0.011), (2**20, 0.101)):
        meter.note(size, seconds)

    link = meter.link
    assert link is not None
    assert link.bytes_per_second == pytest.approx(2**20 / 0.1)


@pytest.mark.parametrize("values", [(0.0, 0.0), (-1.0, 0.0), (1.0, -0.1), (1.0, math.inf), (math.nan, 0.0)])
def test_impossible_links_are_refused(values: tuple[float, float]) -> None:
    """Throughput is positive, latency finite and not negative."""
    with pytest.raises(HandshakeError):
        Link(*values)
