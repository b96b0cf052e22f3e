"""How much a receiver takes in. Every length is checked against these before memory is taken for it."""

from __future__ import annotations

from dataclasses import dataclass

from avp_agents.errors import FrameLimitError

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts of one frame.

    Attributes:
        frame_bytes: The whole frame, as it arrives.
        value_bytes: What its sections hold once they are decompressed.
        head_bytes: Header, metadata, and every section but keys and values; read and checked before anything else.
        metadata_bytes: The metadata.
        sections: How many sections there are.
    """

    frame_bytes: int = 16 * GIB
    value_bytes: int = 16 * GIB
    head_bytes: int = 256 * MIB
    metadata_bytes: int = 1 * MIB
    sections: int = 4096

    def check(self, limit: str, value: int) -> None:
        """Refuse `value` where it is above the limit of that name.

        Raises:
            FrameLimitError: It is.
        """
        allowed = getattr(self, limit)
        if value > allowed:
            raise FrameLimitError(f"The frame's {limit} are {value}, above the limit of {allowed}; see Limits.{limit}.")


DEFAULT_LIMITS = Limits()
