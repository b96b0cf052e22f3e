"""From a server's engine to one in this process: the handshake chooses how, and the context says what it cost."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote

from avp_agents.context import Context
from avp_agents.crossing.sides import Reread
from avp_agents.crossing.take_in import Fetch, Offer, take_in
from avp_agents.crossing.thought import TELL, TELL_TOKENS
from avp_agents.protocol.handshake import IN_PROCESS, CrossingMode, Shipment
from avp_agents.store.base import AnyHandle
from avp_agents.transport.client.remote_context import RemoteContext
from avp_agents.transport.client.remote_engine import RemoteEngine
from avp_agents.transport.wire import API

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine


def hand_over(
    context: RemoteContext | AnyHandle,
    source: RemoteEngine,
    target: LatentEngine,
    *,
    mode: CrossingMode | None = None,
    scope: str | None = None,
    reread: Reread = True,
    text_tokens: int = TELL_TOKENS,
) -> Context:
    """A context of `target` that goes on from one on a server.

    Args:
        context: One of the server's, or its handle.
        source: The server.
        target: The engine that goes on.
        mode: How; by default as the handshake chooses for the measured link and prefill speed.
        scope: The scope that a handle must have been minted for.
        reread: Which text the source read is read again, where only a thought crosses.
        text_tokens: Most tokens of the source's text, where only text crosses.

    Returns:
        The context. Its `handoff` tells mode, reason, bytes and milliseconds of the crossing, and what was of no use.
        After ``"kv"`` it has its KV-cache, else the target prefills its lineage when it is used.

    Raises:
        HandshakeError: The two models cannot use that mode.
        ContextLostError: The server does not have the context.
    """
    remote = context if isinstance(context, RemoteContext) else source.resolve(context, scope=scope)
    payloads: dict[CrossingMode, Fetch] = {
        "kv": partial(source.fetch, remote, kv=True),
        "replay": partial(source.fetch, remote),
        "projection": partial(_thought, source, remote, reread),
        "text": partial(_told, source, remote, text_tokens),
    }
    shipment = Shipment(len(remote), remote.nbytes, remote.kv_bytes)
    offer = Offer(source.info.hello, payloads, shipment, link=source.link() if mode is None else IN_PROCESS)
    before = _moved(source)
    taken = take_in(offer, target.crossing, target.replay, mode=mode)
    taken.context.attach(handoff=replace(taken.handoff, bytes=_moved(source) - before))
    return taken.context


def _thought(source: RemoteEngine, remote: RemoteContext, reread: Reread) -> bytes:
    """What the context says to another model, as the server encodes it."""
    path = f"{API}/contexts/{quote(remote.reference, safe='')}/thought"
    return source.connection.get_bytes(path, {"reread": "all" if reread == "all" else str(reread).lower()})


def _told(source: RemoteEngine, remote: RemoteContext, text_tokens: int) -> str:
    return source.generate(TELL, context=remote, max_tokens=text_tokens).text


def _moved(source: RemoteEngine) -> int:
    return source.connection.bytes_sent + source.connection.bytes_received
