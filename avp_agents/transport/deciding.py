"""How a context crosses to an engine of this process, whatever it travels on, and what comes of a thought or a text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from avp_agents.context import Context, TokenSegment
from avp_agents.crossing.thought import SpokenMessage, SpokenRole, Thought
from avp_agents.errors import HandshakeError
from avp_agents.protocol.frame_decoding import open_frame
from avp_agents.protocol.frame_values import decode_context, encode_context
from avp_agents.protocol.handshake import CrossingMode, Decision, Hello, Link, Shipment, handshake
from avp_agents.usage import HandoffMode

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine

_MEASURED_TEXT = "Which of these agents has read the report, and what did it say about the lighthouse? "
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


def decide(
    theirs: Hello, target: LatentEngine, shipment: Shipment, link: Callable[[], Link], mode: CrossingMode | None
) -> Decision:
    """How a context crosses.

    Args:
        theirs: The source's side of the handshake, with the modes that it offers.
        target: The engine that goes on.
        shipment: What would travel.
        link: What on; asked only where the handshake chooses.
        mode: How; None lets the handshake choose for the link and for the measured speeds of the target.

    Raises:
        HandshakeError: The two cannot use the mode that was asked for.
    """
    ours = target.crossing.hello()
    shaken = handshake(theirs, ours)
    if mode is not None:
        if mode not in shaken.modes:
            possible = ", ".join(shaken.modes) or "nothing"
            raise HandshakeError(f"{theirs.model} and {ours.model} can use {possible}, not {mode}.")
        return Decision(mode, "asked for")
    if "kv" in shaken.modes and "replay" in shaken.modes:
        measured = speeds(target)
        shaken = handshake(theirs, replace(ours, prefill_rate=measured.prefill))
        shipment = replace(shipment, intake_seconds=(shipment.kv_bytes or 0) / measured.intake)
    return shaken.choose(shipment, link())


def received_thought(thought: Thought, target: LatentEngine, *, asked: bool) -> tuple[Context | None, HandoffMode, str]:
    """What an engine makes of a thought.

    Args:
        thought: Of another model, or of another process.
        target: The engine that goes on.
        asked: Take its vector in any case, if it has one; else as the engine is set.

    Returns:
        The context, None where nothing is left and the source has to say it in words; the mode; and why that one.
    """
    if asked and thought.distributions:
        return target.crossing.project(thought), "projection", "with its vector"
    choice = target.crossing.choose(thought)
    if choice.mode == "text":
        return None, choice.mode, choice.reason
    receive = target.crossing.project if choice.mode == "projection" else target.crossing.read
    return receive(choice.thought), choice.mode, choice.reason


def text_context(text: str, target: LatentEngine, speaker: SpokenRole = "assistant") -> Context:
    """A context of an engine that has read a text and nothing else."""
    return target.crossing.read(Thought("", "", (), (SpokenMessage(speaker, text),)))


def speeds(engine: LatentEngine) -> Speeds:
    """How fast an engine is; measured once, at the first call."""
    if engine not in _speeds:
        ids = tuple(engine.encode(_MEASURED_TEXT))
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
