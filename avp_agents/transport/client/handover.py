"""From a server's engine to one in this process: the handshake chooses how, and the context says what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import quote
from weakref import WeakKeyDictionary

from avp_agents.context import Context, TokenSegment
from avp_agents.errors import HandshakeError
from avp_agents.projection.thought import TELL, TELL_TOKENS, SpokenMessage, Thought
from avp_agents.protocol.frame_decoding import open_frame
from avp_agents.protocol.frame_values import decode_context, encode_context
from avp_agents.protocol.handshake import CrossingMode, Decision, Shipment, handshake
from avp_agents.store.base import AnyHandle
from avp_agents.transport.client.remote_context import RemoteContext
from avp_agents.transport.client.remote_engine import RemoteEngine
from avp_agents.transport.wire import API
from avp_agents.usage import Handoff, HandoffMode

if TYPE_CHECKING:
    from avp_agents.engine.crossing import Reread
    from avp_agents.engine.latent_engine import LatentEngine

_MEASURED_POSITIONS = 256
_MEASURED_TIMES = 3

_KEY = bytes(32)
"""Of the frame that is measured with; it goes nowhere."""

_speeds: WeakKeyDictionary[LatentEngine, Speeds] = WeakKeyDictionary()


@dataclass(frozen=True)
class Speeds:
    """What an engine does with a context that comes.

    Attributes:
        prefill: Positions per second that it prefills.
        intake: Bytes per second of a KV-cache that it checks and takes in.
    """

    prefill: float
    intake: float


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
    decision = _decide(remote, source, target, mode)
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


def prefill_rate(engine: LatentEngine, context: Context) -> float:
    """Positions per second that an engine prefills; see `speeds`."""
    return speeds(engine, context).prefill


def speeds(engine: LatentEngine, context: Context) -> Speeds:
    """How fast an engine is, measured once on ids of this context's."""
    if engine not in _speeds:
        ids = context.token_ids() or (0,)
        ids = (ids * (_MEASURED_POSITIONS // len(ids) + 1))[:_MEASURED_POSITIONS]
        # each time in another order: equal beginnings are not computed again
        orders = [ids[turn:] + ids[:turn] for turn in range(1, 1 + _MEASURED_TIMES)]
        measured = [_measure(engine, order) for order in orders]
        _speeds[engine] = Speeds(max(one.prefill for one in measured), max(one.intake for one in measured))
    return _speeds[engine]


def _measure(engine: LatentEngine, ids: tuple[int, ...]) -> Speeds:
    made = engine.replay(Context(engine.fingerprint, engine.dtype, (TokenSegment(ids),)))
    usage = made.usage
    assert usage is not None, "what an engine made says what it cost"
    frame = encode_context(made, key=_KEY).assemble()
    started = time.perf_counter()
    engine.accept(decode_context(open_frame(frame, key=_KEY)))
    return Speeds(
        prefill=(usage.prompt_tokens - usage.positions_reused) / max(usage.prefill_seconds, 1e-6),
        intake=len(frame) / (time.perf_counter() - started),
    )


def _decide(remote: RemoteContext, source: RemoteEngine, target: LatentEngine, mode: CrossingMode | None) -> Decision:
    theirs = source.info.hello
    ours = target.crossing.hello()
    shaken = handshake(theirs, ours)
    if mode is not None:
        if mode not in shaken.modes:
            raise HandshakeError(f"{theirs.model} and {ours.model} can use {', '.join(shaken.modes)}, not {mode}.")
        return Decision(mode, "asked for")
    intake_seconds = 0.0
    if "kv" in shaken.modes:
        ours = replace(ours, prefill_rate=prefill_rate(target, remote))
        intake_seconds = (remote.kv_bytes or 0) / speeds(target, remote).intake
    shipment = Shipment(len(remote), remote.nbytes, remote.kv_bytes, intake_seconds)
    return handshake(theirs, ours).choose(shipment, source.link())


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
    told = source.generate(TELL, context=remote, max_tokens=text_tokens)
    spoken = SpokenMessage("assistant", told.text)
    return target.crossing.read(Thought(remote.fingerprint, remote.recipe_id, (), (spoken,)))


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
    if asked and thought.distributions:
        return target.crossing.project(thought), "projection", "with its vector"
    choice = target.crossing.choose(thought)
    if choice.mode == "text":
        return _cross(remote, source, target, "text", text_tokens), "text", choice.reason
    crossed = target.crossing.project if choice.mode == "projection" else target.crossing.read
    return crossed(choice.thought), choice.mode, choice.reason


def _moved(source: RemoteEngine) -> int:
    return source.connection.bytes_sent + source.connection.bytes_received
