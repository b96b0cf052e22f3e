"""What a context says to a model that cannot read its tensors: distributions over bytes, and the text that was read.

    fingerprint, origin     whose thought it is, and of which context (its recipe id)
    distributions           what the source was about to say: its likeliest next tokens as bytes, with probabilities;
                            about 2 kB each
    messages                what the source had read, as roles and texts

The receiver needs neither the source's weights nor its tokenizer. `Thought.encode` and `Thought.decode` are its form
on a wire (msgpack); everything that arrives is checked before it is used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

import msgpack
import numpy as np

from avp_agents.errors import ProjectionError

VERSION = 1
MAX_TOKENS = 256
MAX_PIECE = 255
MAX_DISTRIBUTIONS = 64
MAX_MESSAGES = 1024
MAX_BYTES = 16 * 2**20
_DIGEST = re.compile(r"[0-9a-f]{16,128}")

TELL = "Say in your own words what you found out: the facts that matter, and your answer."
"""What a source is asked where only its words cross: behind latent steps, a model that is asked nothing says little."""
TELL_TOKENS = 256
"""How many of its words then cross at most."""

SpokenRole = Literal["system", "user", "assistant", "tool"]
_ROLES: tuple[str, ...] = get_args(SpokenRole)


@dataclass(frozen=True)
class SpokenMessage:
    """A message that the source read or wrote, as text."""

    role: SpokenRole
    content: str

    def to_chat(self) -> dict[str, str]:
        """As a chat message for an engine's prompt."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class ByteDistribution:
    """The likeliest next tokens of a model, as bytes.

    Attributes:
        pieces: At most 256 byte strings, likeliest first.
        probabilities: Theirs, of the whole distribution: they sum to at most 1.
    """

    pieces: tuple[bytes, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Thought:
    """What one context says to another model.

    Attributes:
        fingerprint: The source model's.
        origin: Recipe id of the context.
        distributions: One per vector that the receiver can make of it, oldest first.
        messages: What the source read, in order.
    """

    fingerprint: str
    origin: str
    distributions: tuple[ByteDistribution, ...]
    messages: tuple[SpokenMessage, ...] = ()

    def encode(self) -> bytes:
        """Its bytes for a wire.

        Raises:
            ProjectionError: It is larger than a receiver would take.
        """
        data = {
            "v": VERSION,
            "fingerprint": self.fingerprint,
            "origin": self.origin,
            "distributions": [_pack(distribution) for distribution in self.distributions],
            "messages": [[message.role, message.content] for message in self.messages],
        }
        encoded = cast("bytes", msgpack.packb(data))
        _require(len(encoded) <= MAX_BYTES, f"it takes {len(encoded)} bytes, more than {MAX_BYTES}")
        return encoded

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Thought:
        """Read what another process sent; it is untrusted.

        Raises:
            ProjectionError: It is not well formed, too large, or of a version this release does not know.
        """
        _require(len(data) <= MAX_BYTES, f"it takes {len(data)} bytes, more than {MAX_BYTES}")
        try:
            fields = msgpack.unpackb(data, strict_map_key=True, max_ext_len=0)
        except (ValueError, msgpack.UnpackException) as error:
            raise ProjectionError(f"This is no thought: {error or type(error).__name__}.") from error
        names = {"v", "fingerprint", "origin", "distributions", "messages"}
        _require(isinstance(fields, dict) and fields.keys() == names, f"its fields must be {', '.join(sorted(names))}")
        _require(fields["v"] == VERSION, f"version {fields['v']!r} is unknown; this release reads {VERSION}")
        distributions, messages = fields["distributions"], fields["messages"]
        _require_list(distributions, MAX_DISTRIBUTIONS, "distributions")
        _require_list(messages, MAX_MESSAGES, "messages")
        return cls(
            fingerprint=_digest(fields["fingerprint"], "fingerprint"),
            origin=_digest(fields["origin"], "origin"),
            distributions=tuple(_unpack(distribution) for distribution in distributions),
            messages=tuple(_read_message(message) for message in messages),
        )


def _pack(distribution: ByteDistribution) -> list[bytes]:
    """Lengths (one byte each), the bytes themselves, and the probabilities as float16."""
    pieces = distribution.pieces
    _require(len(pieces) <= MAX_TOKENS, f"a distribution has {len(pieces)} tokens, more than {MAX_TOKENS}")
    _require(all(0 < len(piece) <= MAX_PIECE for piece in pieces), f"a token has no bytes, or more than {MAX_PIECE}")
    probabilities = np.asarray(distribution.probabilities, dtype="<f2")
    return [bytes(map(len, pieces)), b"".join(pieces), probabilities.tobytes()]


def _unpack(packed: object) -> ByteDistribution:
    well_formed = isinstance(packed, list) and len(packed) == 3 and all(isinstance(part, bytes) for part in packed)
    _require(well_formed, "a distribution is not three byte strings")
    lengths, joined, floats = cast("list[bytes]", packed)
    _require(len(lengths) <= MAX_TOKENS, f"a distribution has more than {MAX_TOKENS} tokens")
    fits = sum(lengths) == len(joined) and len(floats) == 2 * len(lengths) and 0 not in lengths
    _require(fits, "a distribution's parts do not fit together")
    probabilities = np.frombuffer(floats, dtype="<f2").astype(np.float32)
    total = float(probabilities.sum()) if np.isfinite(probabilities).all() and (probabilities >= 0).all() else np.inf
    # float16 rounds each probability by up to 1/2048 of itself
    _require(total <= 1.01, "a distribution's probabilities are negative, not finite, or sum to more than 1")
    pieces, start = [], 0
    for length in lengths:
        pieces.append(joined[start : start + length])
        start += length
    return ByteDistribution(tuple(pieces), tuple(probabilities.tolist()))


def _read_message(data: object) -> SpokenMessage:
    pair = data if isinstance(data, list) else []
    _require(len(pair) == 2 and pair[0] in _ROLES and isinstance(pair[1], str), "a message is not a role and a text")
    return SpokenMessage(pair[0], pair[1])


def _require_list(value: object, limit: int, name: str) -> None:
    _require(isinstance(value, list) and len(value) <= limit, f"its {name} are not a list of at most {limit}")


def _digest(value: object, name: str) -> str:
    _require(isinstance(value, str) and _DIGEST.fullmatch(value) is not None, f"its {name} is not a digest")
    return cast("str", value)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ProjectionError(f"This thought cannot be used: {what}.")
