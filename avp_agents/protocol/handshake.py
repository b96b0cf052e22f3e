"""The handshake: each side says what it runs, and every handoff gets the cheapest mode that both can do.

    same weights, same dtype              "kv" or "replay", whichever is there sooner
    same weights, another dtype           "replay"
    enough of the vocabulary in common    "projection"
    anything else                         "text"

Nothing here does I/O or reads a clock: `Hello` is exchanged by whatever transport there is, `handshake` compares two of
them (cached per pair), and `Handshake.choose` weighs one handoff against a measured `Link`.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal, cast, get_args

from avp_agents.errors import HandshakeError

CrossingMode = Literal["kv", "replay", "projection", "text"]
"""How a context can cross from one engine to another, cheapest loss first."""

MODES: tuple[CrossingMode, ...] = get_args(CrossingMode)
MIN_OVERLAP = 0.5
SKETCH_SIZE = 512
HELLO_VERSION = 1
_CACHED_PAIRS = 256
_MAX_TEXT = 256
_HEX = re.compile(r"[0-9a-f]{16,128}")


@dataclass(frozen=True)
class VocabularySketch:
    """A vocabulary in 2 kB: enough to tell how much of it another one shares.

    Attributes:
        digest: Of all token bytes with their ids (hexadecimal).
        size: Different byte strings in it.
        lowest: The `SKETCH_SIZE` lowest 32-bit hashes of those byte strings, ascending (a bottom-k sketch).
    """

    digest: str
    size: int
    lowest: tuple[int, ...]

    def overlap(self, other: VocabularySketch) -> float:
        """Share of the smaller vocabulary that the other one has too, 0 to 1; within about 0.05.

        Hashes up to the lower of the two sketches' ends are a random sample that both sides know completely.
        """
        if self.digest == other.digest:
            return 1.0
        small, large = sorted((self, other), key=lambda sketch: sketch.size)
        end = min(small._end, large._end)
        sample = [h for h in small.lowest if h <= end]
        known = frozenset(large.lowest)
        return sum(h in known for h in sample) / len(sample) if sample else 0.0

    @property
    def _end(self) -> int:
        """The hash up to which nothing is left out."""
        return self.lowest[-1] if len(self.lowest) == SKETCH_SIZE else 2**32


@dataclass(frozen=True)
class Hello:
    """What one side of a handoff is.

    Attributes:
        fingerprint: Of its model (hexadecimal).
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        vocabulary: Its tokens' bytes.
        modes: What it can send and take.
        prefill_rate: Positions per second that it prefills, as measured; None where it was not measured yet.
        model: The model's name, for people.
    """

    fingerprint: str
    dtype: str
    vocabulary: VocabularySketch
    modes: tuple[CrossingMode, ...] = MODES
    prefill_rate: float | None = None
    model: str = ""

    def to_wire(self) -> dict[str, Any]:
        """As JSON data, about 3 kB."""
        lowest = b"".join(h.to_bytes(4, "little") for h in self.vocabulary.lowest)
        return {
            "v": HELLO_VERSION,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "vocabulary": {
                "digest": self.vocabulary.digest,
                "size": self.vocabulary.size,
                "lowest": base64.b64encode(lowest).decode(),
            },
            "modes": list(self.modes),
            "prefill_rate": self.prefill_rate,
            "model": self.model,
        }

    @classmethod
    def from_wire(cls, data: object) -> Hello:
        """Read what another side sent; it is untrusted.

        Raises:
            HandshakeError: It is not well formed, or of a version this release does not know.
        """
        wire = _mapping(data, "A hello")
        if wire.get("v") != HELLO_VERSION:
            raise HandshakeError(f"Hello version {wire.get('v')!r} is unknown; this release speaks {HELLO_VERSION}.")
        modes = wire.get("modes")
        if not isinstance(modes, list | tuple) or len(modes) > 16:
            raise HandshakeError("A hello's 'modes' must be a list.")
        # a mode that a later release adds is one that this side does not have
        known: tuple[CrossingMode, ...] = tuple(mode for mode in MODES if mode in modes)
        dtype = wire.get("dtype")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise HandshakeError("A hello's 'dtype' must be 'float32', 'bfloat16' or 'float16'.")
        model = wire.get("model", "")
        if not isinstance(model, str) or len(model) > _MAX_TEXT:
            raise HandshakeError(f"A hello's 'model' must be text of at most {_MAX_TEXT} characters.")
        return cls(
            fingerprint=_hex(wire.get("fingerprint"), "fingerprint"),
            dtype=dtype,
            vocabulary=_read_sketch(wire.get("vocabulary")),
            modes=known,
            prefill_rate=_read_rate(wire.get("prefill_rate")),
            model=model,
        )


@dataclass(frozen=True)
class Link:
    """How fast bytes move between the two sides.

    Attributes:
        bytes_per_second: Throughput; infinite within a process.
        latency_seconds: Time before the first byte arrives.
    """

    bytes_per_second: float = math.inf
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0 or not 0 <= self.latency_seconds < math.inf:
            raise HandshakeError("A link has a positive throughput and a finite latency that is not negative.")

    def seconds(self, size: int) -> float:
        """Time to move `size` bytes."""
        return self.latency_seconds + size / self.bytes_per_second


IN_PROCESS = Link()


class LinkMeter:
    """Learns a `Link` from transfers as they happen. Keeps the last 64 of them."""

    def __init__(self) -> None:
        self._transfers: deque[tuple[int, float]] = deque(maxlen=64)

    def note(self, size: int, seconds: float) -> None:
        """A transfer of `size` bytes took `seconds`, from the request to the last byte."""
        if size >= 0 and 0 < seconds < math.inf:
            self._transfers.append((size, seconds))

    @property
    def link(self) -> Link | None:
        """What the transfers say; None before a first one of 64 kB or more.

        The latency is that of the quickest transfer, the throughput the one at which half of all bytes of large
        transfers came faster: what buffers on the way let through at once makes short transfers look fast.
        """
        transfers = list(self._transfers)
        large = [(size, seconds) for size, seconds in transfers if size >= 2**16]
        if not large:
            return None
        small = [seconds for size, seconds in transfers if size < 2**12]
        latency = min(small, default=0.0)
        by_rate = sorted((size / max(seconds - latency, 1e-6), size) for size, seconds in large)
        return Link(bytes_per_second=_weighted_median(by_rate), latency_seconds=latency)


@dataclass(frozen=True)
class Shipment:
    """One context that is to be handed over.

    Attributes:
        positions: Positions of its lineage: what a replay prefills.
        lineage_bytes: Bytes of its lineage and readout.
        kv_bytes: Bytes of its KV-cache as it would travel; None where there is none any more.
        intake_seconds: Time that the target takes to check the KV-cache and take it in, once it is there.
    """

    positions: int
    lineage_bytes: int
    kv_bytes: int | None
    intake_seconds: float = 0.0

    def to_wire(self) -> dict[str, int | None]:
        """What another side is told, as JSON data."""
        return {"positions": self.positions, "lineage_bytes": self.lineage_bytes, "kv_bytes": self.kv_bytes}

    @classmethod
    def from_wire(cls, data: object) -> Shipment:
        """Read what another side told; it is untrusted.

        Raises:
            HandshakeError: It is not well formed.
        """
        wire = _mapping(data, "A shipment")
        positions, lineage, kv = (wire.get(name) for name in ("positions", "lineage_bytes", "kv_bytes"))
        if not all(type(size) is int and size > 0 for size in (positions, lineage, 1 if kv is None else kv)):
            raise HandshakeError("A shipment's 'positions', 'lineage_bytes' and 'kv_bytes' are positive numbers.")
        return cls(cast("int", positions), cast("int", lineage), cast("int | None", kv))


@dataclass(frozen=True)
class Decision:
    """What a handshake came to, for one handoff.

    Attributes:
        mode: The chosen mode.
        reason: Why, in a few words.
        estimates: Seconds that each mode which was weighed is expected to take.
    """

    mode: CrossingMode
    reason: str
    estimates: tuple[tuple[CrossingMode, float], ...] = ()

    def to_metadata(self) -> dict[str, Any]:
        """As JSON data, for a response's metadata; times in milliseconds."""
        return {
            "mode": self.mode,
            "reason": self.reason,
            "estimated_ms": {mode: round(1e3 * seconds, 3) for mode, seconds in self.estimates},
        }


@dataclass(frozen=True)
class Handshake:
    """What two sides found out about each other.

    Attributes:
        source: The side whose context it is.
        target: The side that goes on from it.
        overlap: Share of the smaller vocabulary that the other one has too.
    """

    source: Hello
    target: Hello
    overlap: float

    @property
    def modes(self) -> tuple[CrossingMode, ...]:
        """The modes that these two can use, best first."""
        source, target = self.source, self.target
        offered = [mode for mode in source.modes if mode in target.modes]
        possible: list[CrossingMode] = []
        if source.fingerprint == target.fingerprint:
            possible = ["kv", "replay"] if source.dtype == target.dtype else ["replay"]
        if self.overlap >= MIN_OVERLAP:
            possible.append("projection")
        return tuple(mode for mode in (*possible, "text") if mode in offered)

    def choose(self, shipment: Shipment, link: Link = IN_PROCESS) -> Decision:
        """The mode for one handoff.

        Args:
            shipment: What there is to hand over.
            link: What it travels on.

        Raises:
            HandshakeError: The two sides have no mode in common.
        """
        modes = self.modes
        if not modes:
            raise HandshakeError(
                f"{self._name(self.source)} and {self._name(self.target)} have no handoff mode in common "
                f"({', '.join(self.source.modes) or 'none'} / {', '.join(self.target.modes) or 'none'})."
            )
        if "kv" in modes and "replay" in modes and shipment.kv_bytes is not None:
            return self._kv_or_replay(shipment, shipment.kv_bytes, link)
        if "kv" in modes and shipment.kv_bytes is not None:
            seconds = link.seconds(shipment.kv_bytes)
            return Decision("kv", "same model; not both sides offer a replay", _known(kv=seconds))
        if "replay" in modes:
            why = "same weights in another dtype" if self.source.dtype != self.target.dtype else "no KV-cache is left"
            return Decision("replay", why, _known(replay=self._replay_seconds(shipment, link)))
        if "projection" in modes:
            return Decision("projection", f"another model; {self.overlap:.0%} of the smaller vocabulary is shared")
        return Decision("text", self._why_text())

    def _kv_or_replay(self, shipment: Shipment, kv_bytes: int, link: Link) -> Decision:
        kv = link.seconds(kv_bytes) + shipment.intake_seconds
        replay = self._replay_seconds(shipment, link)
        estimates = _known(kv=kv, replay=replay)
        if replay is None:
            return Decision("kv", "same model; the prefill speed is not known yet", estimates)
        if kv <= replay:
            return Decision("kv", "same model; moving the KV-cache is quicker than rebuilding it", estimates)
        return Decision("replay", "same model; rebuilding the KV-cache is quicker than moving it", estimates)

    def _replay_seconds(self, shipment: Shipment, link: Link) -> float | None:
        rate = self.target.prefill_rate
        return None if rate is None else link.seconds(shipment.lineage_bytes) + shipment.positions / rate

    def _why_text(self) -> str:
        if self.source.fingerprint == self.target.fingerprint:
            return "same model, but the two sides offer no mode that moves a context"
        if self.overlap < MIN_OVERLAP:
            return f"another model; only {self.overlap:.0%} of the smaller vocabulary is shared"
        return "another model; not both sides offer projection"

    @staticmethod
    def _name(side: Hello) -> str:
        return side.model or side.fingerprint[:16]


@lru_cache(maxsize=_CACHED_PAIRS)
def handshake(source: Hello, target: Hello) -> Handshake:
    """Compare two sides; the last 256 pairs are remembered."""
    return Handshake(source, target, source.vocabulary.overlap(target.vocabulary))


def _weighted_median(sorted_values: Sequence[tuple[float, int]]) -> float:
    """The value at which half of all weight is reached."""
    half = sum(weight for _, weight in sorted_values) / 2
    reached = accumulate(weight for _, weight in sorted_values)
    return next(value for (value, _), weight in zip(sorted_values, reached, strict=True) if weight >= half)


def _known(**seconds: float | None) -> tuple[tuple[CrossingMode, float], ...]:
    return tuple((cast("CrossingMode", mode), value) for mode, value in seconds.items() if value is not None)


def _mapping(data: object, what: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise HandshakeError(f"{what} is a JSON object, not {type(data).__name__}.")
    return cast("Mapping[str, Any]", data)


def _hex(value: object, name: str) -> str:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise HandshakeError(f"A hello's {name!r} must be 16 to 128 hexadecimal digits.")
    return value


def _read_rate(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise HandshakeError("A hello's 'prefill_rate' must be a positive number of positions per second, or null.")
    return float(value)


def _read_sketch(data: object) -> VocabularySketch:
    wire = _mapping(data, "A hello's 'vocabulary'")
    size, text = wire.get("size"), wire.get("lowest")
    if type(size) is not int or not 0 <= size < 2**31:
        raise HandshakeError("A vocabulary's 'size' must be an integer between 0 and 2**31 - 1.")
    if not isinstance(text, str) or len(text) > 8 * SKETCH_SIZE:
        raise HandshakeError("A vocabulary's 'lowest' must be base64 text of at most 4 kB.")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HandshakeError("A vocabulary's 'lowest' is not base64.") from error
    lowest = tuple(int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4))
    ascending = all(a < b for a, b in pairwise(lowest))
    if len(raw) % 4 or len(lowest) > min(size, SKETCH_SIZE) or not ascending:
        raise HandshakeError(f"A vocabulary's 'lowest' holds its lowest hashes in order, {SKETCH_SIZE} at most.")
    return VocabularySketch(_hex(wire.get("digest"), "digest"), size, lowest)
