"""What a message hands over: its text, and a context of the receiver's engine."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from a2a.types import Artifact, Message, Part

from avp_agents.context import Context
from avp_agents.crossing.take_in import AsyncFetch, Offer, atake_in
from avp_agents.errors import AvpError, HandshakeError, LimitExceededError
from avp_agents.handle import ContextHandle
from avp_agents.protocol.handshake import IN_PROCESS, MODES, CrossingMode, Hello, Link, Shipment
from avp_agents.protocol.limits import Limits
from avp_agents.transport.a2a.announcement import RAW_BYTES, VERSION
from avp_agents.transport.a2a.fetching import UrlPolicy, fetch
from avp_agents.transport.a2a.names import EXTENSION_URI
from avp_agents.transport.a2a.offering import CONTEXT_TYPE
from avp_agents.transport.a2a.structs import from_protobuf
from avp_agents.transport.json_fields import Fields
from avp_agents.transport.wire import frame_key
from avp_agents.usage import Handoff

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine

log = logging.getLogger(__name__)

UNMEASURED = Link(bytes_per_second=12.5e6, latency_seconds=0.02)
"""What a URL's link is taken for before the first payload came over it: 100 Mbit/s."""


@dataclass(frozen=True)
class Received:
    """What a message handed over.

    Attributes:
        text: What it says; without the text that stands beside a context.
        context: A context of the receiver's engine, to generate on; None where the message hands none over.
        handoff: How it came; mode ``"text"`` without a context where there was only text to read.
        handle: The sender's handle; None without a context.
    """

    text: str
    context: Context | None
    handoff: Handoff
    handle: ContextHandle | None = None


async def receive(
    message: Message | Artifact | Sequence[Part],
    engine: LatentEngine,
    *,
    token: str | None,
    urls: UrlPolicy | None = None,
    mode: CrossingMode | None = None,
) -> Received:
    """Take what a message hands over, by the mode that the handshake chooses.

    Payloads that are refused (not allowed, too large, altered, of another key) are left out with a warning in the log
    and a note in the handoff; what is left in the end is the text beside the context.

    Args:
        message: A message, an artifact, or their parts; untrusted.
        engine: The engine that goes on.
        token: The secret that sender and receiver share: it authenticates frames, and opens the server that a URL
            names.
        urls: What may be fetched for this sender; None fetches nothing.
        mode: How; by default as the handshake chooses.

    Raises:
        HandshakeError: `mode` was asked for, and is not possible.
        TransportError: The message's metadata is malformed.
        AvpError: As the engine; and where a mode was asked for, as fetching and reading the payload.
    """
    parts = list(message.parts) if isinstance(message, Message | Artifact) else list(message)
    text = "\n".join(part.text for part in parts if _kind(part) == "text" and not _note(part).get("beside"))
    described = next((part for part in parts if _kind(part) == "data" and part.media_type == CONTEXT_TYPE), None)
    if described is None:
        return _only_text(parts, "the sender hands no context over", mode)
    try:
        handle, hello, shipment = _read(described)
    except AvpError as error:
        log.warning("A context that was handed over cannot be understood: %s", error)
        return _only_text(parts, f"the context cannot be understood: {error}", mode)
    payloads, by_url = _payloads(parts, token, urls)
    if by_url and urls is not None and (shipment.kv_bytes or 0) > urls.max_bytes:
        payloads.pop("kv", None)
    beside = "\n".join(part.text for part in parts if _note(part).get("beside") == handle.id)
    if beside:
        payloads["text"] = partial(_given, beside)
    if not payloads:
        return _only_text(parts, "nothing that this side can take comes with the context", mode)
    link = IN_PROCESS if urls is None or not by_url else urls.meter.link or UNMEASURED
    limits = _limits(urls)
    offer = Offer(hello, payloads, shipment, link=link, key=frame_key(token), limits=limits)
    taken = await atake_in(offer, engine.crossing, engine.replay, mode=mode)
    return Received(text, taken.context, taken.handoff, handle)


def _only_text(parts: Iterable[Part], reason: str, mode: CrossingMode | None) -> Received:
    """All text of a message; it is the caller's to read."""
    if mode not in (None, "text"):
        raise HandshakeError(f"The mode {mode} was asked for, but {reason}.")
    text = "\n".join(part.text for part in parts if _kind(part) == "text")
    return Received(text, None, Handoff("text", reason))


def _read(part: Part) -> tuple[ContextHandle, Hello, Shipment]:
    """What a context's description says; untrusted.

    Raises:
        AvpError: It makes no sense.
    """
    told = from_protobuf(part.data)
    fields = Fields(told, "The context's description")
    if (version := fields.require("v", int)) != VERSION:
        raise HandshakeError(f"version {version} is unknown; this release reads {VERSION}")
    handle = ContextHandle.from_state(fields.require("handle", dict))
    return handle, Hello.from_wire(fields.require("hello", dict)), Shipment.from_wire(told)


def _payloads(
    parts: Sequence[Part], token: str | None, urls: UrlPolicy | None
) -> tuple[dict[CrossingMode, AsyncFetch], bool]:
    """How to get each payload that is there, and whether any has to be fetched."""
    payloads: dict[CrossingMode, AsyncFetch] = {}
    by_url, given = False, sum(len(part.raw) for part in parts)
    for part in parts:
        mode, kind = _note(part).get("mode"), _kind(part)
        if mode not in MODES or mode == "text" or mode in payloads or kind not in ("raw", "url"):
            continue
        if kind == "raw":
            payloads[mode] = partial(_given, part.raw, given)
        elif urls is not None:
            payloads[mode], by_url = partial(fetch, part.url, urls, token=token), True
    return payloads, by_url


async def _given(payload: bytes | str, raw_bytes: int = 0) -> bytes | str:
    """What the message itself holds, unless its raw bytes are too many."""
    if raw_bytes > RAW_BYTES:
        raise LimitExceededError(f"{raw_bytes} raw bytes are more than the {RAW_BYTES} that were announced.")
    return payload


def _limits(urls: UrlPolicy | None) -> Limits:
    most = max(RAW_BYTES, urls.max_bytes if urls is not None else 0)
    return Limits(frame_bytes=most, value_bytes=4 * most, head_bytes=min(most, Limits.head_bytes))


def _note(part: Part) -> dict[str, Any]:
    """What the extension says in a part's metadata; untrusted."""
    if EXTENSION_URI not in part.metadata.fields:
        return {}
    note = from_protobuf(part.metadata.fields[EXTENSION_URI])
    return note if isinstance(note, dict) else {}


def _kind(part: Part) -> str | None:
    return part.WhichOneof("content")
