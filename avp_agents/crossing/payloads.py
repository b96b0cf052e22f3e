"""What travels of a context to another process, for each mode that needs more than words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from avp_agents.context import Context
from avp_agents.crossing.sides import Crossing
from avp_agents.protocol.frame_values import encode_context
from avp_agents.protocol.handshake import CrossingMode

FRAME_TYPE = "application/vnd.avp.frame"
THOUGHT_TYPE = "application/vnd.avp.thought"
MEDIA_TYPES: Mapping[CrossingMode, str] = {"kv": FRAME_TYPE, "replay": FRAME_TYPE, "projection": THOUGHT_TYPE}


def encoding_for(mode: CrossingMode, context: Context, own: Crossing, key: bytes) -> tuple[int, Callable[[], bytes]]:
    """A payload's size, and what makes its bytes.

    Args:
        mode: One of `MEDIA_TYPES`.
        context: One of `own`'s.
        own: The model's side.
        key: Of frames.

    Raises:
        ProjectionError: It is a thought, and larger than a receiver would take.
    """
    if mode == "projection":
        thought = own.express(context).encode()
        return len(thought), lambda: thought
    frame = encode_context(context, key=key, with_kv=mode == "kv")
    return frame.nbytes, lambda: b"".join(frame)
