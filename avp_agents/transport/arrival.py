"""A context that another process offers becomes one of an engine here: what the bindings to MCP and A2A share.

An `Offer` says what the source is and which payloads there are. The handshake chooses among those, the payload is
fetched, checked, and made a context. A payload that turns out to be of no use is noted, and the next best is taken,
down to text; the context's handoff says what happened.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from avp_agents.context import Context
from avp_agents.crossing.thought import SpokenRole, Thought
from avp_agents.errors import AvpError, EngineError, HandshakeError, ProjectionError, TransportError
from avp_agents.protocol.frame_decoding import open_frame
from avp_agents.protocol.frame_values import decode_context
from avp_agents.protocol.handshake import IN_PROCESS, CrossingMode, Decision, Hello, Link, Shipment
from avp_agents.protocol.limits import DEFAULT_LIMITS, Limits
from avp_agents.transport.deciding import decide, received_thought, text_context
from avp_agents.usage import Handoff, HandoffMode

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine

log = logging.getLogger(__name__)

FRAME_TYPE = "application/vnd.avp.frame"
THOUGHT_TYPE = "application/vnd.avp.thought"

Payload = bytes | bytearray
Fetch = Callable[[], Awaitable[Payload]]
"""Gets one payload; raises an `AvpError` where it cannot be had."""


@dataclass(frozen=True)
class Offer:
    """What another process offers of one context.

    Attributes:
        source: Its side of the handshake; None where it speaks no protocol of ours and only text is there.
        payloads: How to get what each mode needs: a frame with keys and values (``"kv"``), one without (``"replay"``),
            an encoded `Thought` (``"projection"``), UTF-8 (``"text"``).
        shipment: Its size; None where only text is there.
        speaker: Whose words the text is.
    """

    source: Hello | None
    payloads: Mapping[CrossingMode, Fetch]
    shipment: Shipment | None = None
    speaker: SpokenRole = "assistant"


async def take_in(
    offer: Offer,
    target: LatentEngine,
    *,
    key: bytes,
    link: Link = IN_PROCESS,
    mode: CrossingMode | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Context:
    """Make what is offered a context of an engine.

    Args:
        offer: What there is.
        target: The engine that goes on.
        key: Of the frames.
        link: What payloads travel on.
        mode: How; by default as the handshake chooses.
        limits: Of frames.

    Returns:
        The context. Its `handoff` tells mode, reason, bytes, milliseconds, and in its notes which payloads were of no
        use.

    Raises:
        HandshakeError: The two models cannot use the mode that was asked for, or have none in common.
        AvpError: As fetching and reading the last payload that there was.
    """
    left, notes, moved, seconds = dict(offer.payloads), [], 0, 0.0
    while True:
        decision = await asyncio.to_thread(_decide, offer, left, target, link, mode)
        started = time.perf_counter()
        try:
            payload = await left.pop(decision.mode)()
            moved += len(payload)
            context, done, why = await asyncio.to_thread(
                _become, decision.mode, payload, offer, target, key, limits, asked=mode is not None
            )
            break
        except EngineError:
            raise
        except AvpError as error:
            if mode is not None or not left:
                raise
            log.warning("A payload for %s was of no use: %s", decision.mode, error)
            notes.append(f"{decision.mode}: {error}")
        finally:
            seconds += time.perf_counter() - started
    handoff = Handoff(
        mode=done,
        reason=f"{decision.reason}; {why}" if why else decision.reason,
        bytes=moved,
        milliseconds=1e3 * seconds,
        notes=tuple(notes),
        estimated_ms=decision.to_metadata()["estimated_ms"],
    )
    context.attach(handoff=handoff)
    return context


def _decide(
    offer: Offer, payloads: Mapping[CrossingMode, Fetch], target: LatentEngine, link: Link, mode: CrossingMode | None
) -> Decision:
    if offer.source is None or offer.shipment is None:
        if mode not in (None, "text"):
            raise HandshakeError(f"The other side offers text only, not {mode}.")
        return Decision("text", "the other side offers text only")
    theirs = replace(offer.source, modes=tuple(known for known in offer.source.modes if known in payloads))
    return decide(theirs, target, offer.shipment, lambda: link, mode)


def _become(
    mode: CrossingMode,
    payload: Payload,
    offer: Offer,
    target: LatentEngine,
    key: bytes,
    limits: Limits,
    *,
    asked: bool,
) -> tuple[Context, HandoffMode, str]:
    """The context that a payload makes, the mode that this is in the end, and why that one."""
    if mode == "text":
        return text_context(_text(payload), target, offer.speaker), "text", ""
    if mode == "projection":
        received, done, why = received_thought(Thought.decode(memoryview(payload)), target, asked=asked)
        if received is None:
            raise ProjectionError(f"Nothing is left of the thought: {why}.")
        return received, done, why
    context = decode_context(open_frame(payload, key=key, limits=limits))
    # of the same weights in another dtype the target makes its own when it uses it
    return target.accept(context) if context.dtype == target.dtype else context, mode, ""


def _text(payload: Payload) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise TransportError("The text that was offered is not UTF-8.") from error
