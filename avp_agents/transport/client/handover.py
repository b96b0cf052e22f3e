"""From a server's engine to one in this process: the handshake chooses how, and the context says what it cost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import quote

from avp_agents.context import Context
from avp_agents.crossing.thought import TELL, TELL_TOKENS, Thought
from avp_agents.protocol.handshake import CrossingMode, Shipment
from avp_agents.store.base import AnyHandle
from avp_agents.transport.client.remote_context import RemoteContext
from avp_agents.transport.client.remote_engine import RemoteEngine
from avp_agents.transport.deciding import decide, received_thought, text_context
from avp_agents.transport.wire import API
from avp_agents.usage import Handoff, HandoffMode

if TYPE_CHECKING:
    from avp_agents.crossing.sides import Reread
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
        The context. Its `handoff` tells mode, reason, bytes and milliseconds of the crossing. After ``"kv"`` it has
        its KV-cache, else the target prefills its lineage when it is used.

    Raises:
        HandshakeError: The two models cannot use that mode.
        ContextLostError: The server does not have the context.
    """
    remote = context if isinstance(context, RemoteContext) else source.resolve(context, scope=scope)
    shipment = Shipment(len(remote), remote.nbytes, remote.kv_bytes)
    decision = decide(source.info.hello, target, shipment, source.link, mode)
    before, started = _moved(source), time.perf_counter()
    if decision.mode == "projection":
        crossed, done, why = _project(remote, source, target, reread, text_tokens, asked=mode is not None)
    else:
        crossed = _cross(remote, source, target, decision.mode, text_tokens)
        done, why = decision.mode, decision.reason
    handoff = Handoff(
        mode=done,
        reason=why if why == decision.reason else f"{decision.reason}; {why}",
        bytes=_moved(source) - before,
        milliseconds=1e3 * (time.perf_counter() - started),
        estimated_ms=decision.to_metadata()["estimated_ms"],
    )
    crossed.attach(handoff=handoff)
    return crossed


def _cross(
    remote: RemoteContext,
    source: RemoteEngine,
    target: LatentEngine,
    mode: CrossingMode,
    text_tokens: int,
) -> Context:
    if mode in ("kv", "replay"):
        fetched = source.fetch(remote, kv=mode == "kv")
        # of the same weights in another dtype the target makes its own when it uses it
        return target.accept(fetched) if fetched.dtype == target.dtype else fetched
    return text_context(source.generate(TELL, context=remote, max_tokens=text_tokens).text, target)


def _project(
    remote: RemoteContext,
    source: RemoteEngine,
    target: LatentEngine,
    reread: Reread,
    text_tokens: int,
    *,
    asked: bool,
) -> tuple[Context, HandoffMode, str]:
    """The thought's text, and (where the caller asked for it, or the target's engine is so set) its vector."""
    how = "all" if reread == "all" else str(reread).lower()
    path = f"{API}/contexts/{quote(remote.reference, safe='')}/thought"
    thought = Thought.decode(source.connection.get_bytes(path, {"reread": how}))
    received, done, why = received_thought(thought, target, asked=asked)
    if received is None:
        received = _cross(remote, source, target, "text", text_tokens)
    return received, done, why


def _moved(source: RemoteEngine) -> int:
    return source.connection.bytes_sent + source.connection.bytes_received
