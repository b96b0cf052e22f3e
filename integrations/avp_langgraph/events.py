"""What a running graph streams about handoffs: ``stream_mode="custom"``.

    {"type": "avp_handoff", "node": "solver", "mode": "kv", "reason": "...", "bytes": 0, "milliseconds": 0.4,
     "positions_reused": 61}

There is one such event per answer or thought that builds on a context, whatever rung of the ladder it took.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from langgraph.config import get_stream_writer
from langgraph.types import StreamWriter

from avp_agents.usage import HandoffMode


class HandoffEvent(TypedDict):
    """A context that reached an agent, or did not.

    Attributes:
        type: ``"avp_handoff"``.
        node: The graph's node; empty where there is none.
        mode, reason, bytes, milliseconds, positions_reused: As in the message's metadata.
    """

    type: Literal["avp_handoff"]
    node: str
    mode: HandoffMode
    reason: str
    bytes: int
    milliseconds: float
    positions_reused: int


def stream_handoff(made: Mapping[str, Any], node: str) -> None:
    """Write a handoff to the graph's custom stream; nothing outside of a graph, or where no context was handed on.

    Args:
        made: ``response_metadata["avp"]`` of the message that was made.
        node: The graph's running node.
    """
    if made["mode"] == "none" or (write := _stream_writer()) is None:
        return
    write(
        HandoffEvent(
            type="avp_handoff",
            node=node,
            mode=made["mode"],
            reason=made["reason"],
            bytes=made["bytes"],
            milliseconds=made["milliseconds"],
            positions_reused=made["positions_reused"],
        )
    )


def _stream_writer() -> StreamWriter | None:
    """The running graph's, if one is running."""
    try:
        return get_stream_writer()
    except (RuntimeError, KeyError):  # no runnable is running, or it is not a graph's
        return None
