"""The parts of a message that hand a context over.

text          what a receiver reads that does not take the context
data          the handle, and what it stands for: model, positions, bytes
raw or url    payloads: a frame (lineage, or with its KV-cache) or an encoded thought
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import quote

from a2a.types import Part
from google.protobuf.struct_pb2 import Struct

from avp_agents.context import Context
from avp_agents.crossing.payloads import MEDIA_TYPES, encoding_for
from avp_agents.crossing.sides import Crossing
from avp_agents.engine.latent_engine import LatentEngine
from avp_agents.errors import LimitExceededError
from avp_agents.handle import ContextHandle
from avp_agents.protocol.handshake import CrossingMode, Hello, Shipment, handshake
from avp_agents.transport.a2a.announcement import VERSION, Announcement
from avp_agents.transport.a2a.names import EXTENSION_URI
from avp_agents.transport.a2a.structs import to_struct, to_value
from avp_agents.transport.wire import API, frame_key

if TYPE_CHECKING:
    from avp_agents.transport.client import RemoteEngine

CONTEXT_TYPE = "application/vnd.avp.context+json"


async def offer(
    context: Context,
    engine: LatentEngine | RemoteEngine,
    *,
    to: Announcement | None,
    text: str,
    token: str | None,
    scope: str = "",
    agent: str = "",
    kv: bool = False,
) -> list[Part]:
    """The parts that hand a context over; put them into a message or an artifact, beside others.

    A receiver that did not announce the extension gets the text. For others the text is marked as standing beside the
    context, and payloads are added that the two models can use: of an engine in this process the payload itself
    (``raw``), of a served one where to fetch it (``url``).

    Args:
        context: One of the engine's.
        engine: Whose it is. Of a `RemoteEngine`, the receiver fetches from the server with the same token.
        to: What the receiver announced in its card or message (`announcement_of`); None where it announced nothing.
        text: What the receiver reads where it does not take the context.
        token: A secret that both sides hold; frames are authenticated with it. None only protects against accidents.
        scope: The scope that the handle is minted for.
        agent: Who made the context.
        kv: Add the KV-cache, too, where an engine of this process has one; for a fast link.

    Raises:
        LimitExceededError: The payloads are larger than what the receiver takes ``raw``. Serve the engine instead.
    """
    if to is None:
        return [Part(text=text)]
    handle = await engine.store.aput(context, scope=scope, agent=agent, text=text)
    if isinstance(engine, LatentEngine):
        hello, kv_bytes = await asyncio.to_thread(engine.crossing.hello), context.kv.nbytes if context.kv else None
        payloads = await asyncio.to_thread(_raw, context, engine.crossing, hello, to, frame_key(token), kv)
    else:
        on_server = await engine.aresolve(handle, scope=scope)
        hello, kv_bytes = (await asyncio.to_thread(lambda: engine.info)).hello, on_server.kv_bytes
        payloads = _urls(handle, scope, str(engine.connection.url).rstrip("/"), hello, to)
    return [
        Part(text=text, metadata=to_struct({EXTENSION_URI: {"beside": handle.id}})),
        _described(handle, hello, Shipment(len(context), context.nbytes, kv_bytes)),
        *payloads,
    ]


def _described(handle: ContextHandle, hello: Hello, shipment: Shipment) -> Part:
    told = {"v": VERSION, "handle": dict(handle.to_state()), "hello": hello.to_wire()}
    return Part(data=to_value(told | shipment.to_wire()), media_type=CONTEXT_TYPE)


def _raw(context: Context, own: Crossing, hello: Hello, to: Announcement, key: bytes, kv: bool) -> list[Part]:
    parts, room = [], to.raw_bytes
    for mode in _useful(hello, to):
        if mode == "kv" and not (kv and context.kv is not None):
            continue
        size, encode = encoding_for(mode, context, own, key)
        if size > room:
            raise LimitExceededError(
                f"The payload for {mode} has {size} bytes, and the receiver takes {room} more in a message. Serve the "
                "engine (avp-agents serve) and offer with a RemoteEngine, or leave the KV-cache out."
            )
        room -= size
        parts.append(Part(raw=encode(), media_type=MEDIA_TYPES[mode], metadata=_for_mode(mode)))
    return parts


def _urls(handle: ContextHandle, scope: str, server: str, hello: Hello, to: Announcement) -> list[Part]:
    if not to.url_bytes:
        return []
    one, of_scope = f"{server}{API}/contexts/{quote(handle.id, safe='')}", f"scope={quote(scope, safe='')}"
    paths: dict[CrossingMode, str] = {
        "kv": f"{one}/frame?kv=1&{of_scope}",
        "replay": f"{one}/frame?kv=0&{of_scope}",
        "projection": f"{one}/thought?{of_scope}",
    }
    modes = _useful(hello, to)
    return [Part(url=paths[mode], media_type=MEDIA_TYPES[mode], metadata=_for_mode(mode)) for mode in modes]


def _useful(hello: Hello, to: Announcement) -> list[CrossingMode]:
    """Modes that need a payload and that the two models can do; projection only where nothing better is possible."""
    modes: list[CrossingMode] = [mode for mode in handshake(hello, to.hello).modes if mode in MEDIA_TYPES]
    return [mode for mode in modes if mode != "projection"] or modes


def _for_mode(mode: CrossingMode) -> Struct:
    return to_struct({EXTENSION_URI: {"mode": mode}})
