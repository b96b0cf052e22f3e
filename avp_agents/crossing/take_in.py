"""A context that is offered becomes one of a model here: in one process, over HTTP, MCP and A2A alike.

An `Offer` says what the source is, and how to get what each mode needs. The handshake chooses among those; what is
fetched is checked, and becomes a context. What turns out to be of no use is noted, and the next best is taken, down to
text; the handoff says what happened.

    same weights and dtype         kv            lineage and KV-cache, where moving that is quicker than rebuilding it
    same weights                   replay        the lineage, its latents cast where the dtype is another one
    enough shared vocabulary       projection    the text that the source read, and its thought as a vector
                                   reread        the same without the vector
    anything else                  text          what the source says when it is asked for its thought
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from avp_agents.context import Context, TokenSegment
from avp_agents.crossing.sides import Crossing
from avp_agents.crossing.thought import SpokenMessage, SpokenRole, Thought
from avp_agents.errors import AvpError, EngineError, HandshakeError, ProjectionError, TransportError
from avp_agents.lineage import in_dtype
from avp_agents.protocol.frame_decoding import open_frame
from avp_agents.protocol.frame_values import decode_context, encode_context
from avp_agents.protocol.handshake import IN_PROCESS, CrossingMode, Decision, Hello, Link, Shipment, handshake
from avp_agents.protocol.limits import DEFAULT_LIMITS, Limits
from avp_agents.usage import Handoff, HandoffMode

log = logging.getLogger(__name__)

Payload = bytes | bytearray | str | Context | Thought
"""A frame, an encoded thought or a text, as it travels; or, from a source at hand, what these would hold."""

Fetch = Callable[[], Payload]
"""Gets one payload; raises an `AvpError` where it cannot be had."""

AsyncFetch = Callable[[], Awaitable[Payload]]
"""The same on an event loop."""

Replay = Callable[[Context], Context]
"""The target's engine at work; its speed is measured with it."""

_F = TypeVar("_F")
_MEASURED_TEXT = "Which of these agents has read the report, and what did it say about the lighthouse? "
_MEASURED_POSITIONS = 256
_MEASURED_TIMES = 3
_NO_KEY = bytes(32)
"""Of frames that go nowhere."""


@dataclass(frozen=True)
class Offer(Generic[_F]):
    """What there is of one context.

    Attributes:
        source: Its side of the handshake; None where it speaks no protocol of ours and only text is there.
        payloads: How to get what each mode needs: lineage, keys and values (``"kv"``), the lineage (``"replay"``), a
            thought (``"projection"``), words (``"text"``).
        shipment: Its size; None where only text is there.
        speaker: Whose words the text is.
        link: What payloads travel on.
        key: Of the frames.
        limits: Of frames.
    """

    source: Hello | None
    payloads: Mapping[CrossingMode, _F]
    shipment: Shipment | None = None
    speaker: SpokenRole = "assistant"
    link: Link = IN_PROCESS
    key: bytes = _NO_KEY
    limits: Limits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Taken:
    """What came over.

    Attributes:
        context: A context of the target. Its `handoff` tells mode, reason, bytes, milliseconds, and in its notes which
            payloads were of no use.
        spoken: What it has read, where that is messages.
        handoff: The context's.
    """

    context: Context
    spoken: tuple[SpokenMessage, ...]
    handoff: Handoff


def take_in(
    offer: Offer[Fetch], own: Crossing, replay: Replay | None = None, *, mode: CrossingMode | None = None
) -> Taken:
    """Make what is offered a context of a model.

    Args:
        offer: What there is.
        own: The model that goes on.
        replay: Its engine's; needed where a KV-cache is offered.
        mode: How; by default as the handshake chooses.

    Raises:
        HandshakeError: The two models cannot use the mode that was asked for, or have none in common.
        AvpError: As fetching and reading the last payload that there was.
    """
    intake = _Intake(offer, own, replay, mode)
    while not intake.done:
        fetch = intake.choose()
        with intake.attempt():
            intake.read(fetch())
    return intake.taken()


async def atake_in(
    offer: Offer[AsyncFetch], own: Crossing, replay: Replay | None = None, *, mode: CrossingMode | None = None
) -> Taken:
    """Asynchronous `take_in`: payloads are fetched on the event loop, and read on threads."""
    intake = _Intake(offer, own, replay, mode)
    while not intake.done:
        fetch = await asyncio.to_thread(intake.choose)
        with intake.attempt():
            payload = await fetch()
            await asyncio.to_thread(intake.read, payload)
    return intake.taken()


class _Intake(Generic[_F]):
    """One context on its way in: which payloads are left, and what happened so far."""

    def __init__(self, offer: Offer[_F], own: Crossing, replay: Replay | None, mode: CrossingMode | None) -> None:
        self._offer, self._own, self._replay, self._mode = offer, own, replay, mode
        self._left = dict(offer.payloads)
        self._decision: Decision | None = None
        self._made: tuple[Context, tuple[SpokenMessage, ...], HandoffMode] | None = None
        self._why = ""
        self._notes: list[str] = []
        self._moved, self._seconds = 0, 0.0

    @property
    def done(self) -> bool:
        """Whether there is a context."""
        return self._made is not None

    def choose(self) -> _F:
        """How to get the next payload."""
        if self._decision is not None and self._why:  # nothing is left of a thought but what its source says of it
            self._decision = replace(self._decision, mode="text")
        else:
            self._decision = self._decide()
        return self._left.pop(self._decision.mode)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Fetch and read; a failure is noted, where there is something else to try."""
        assert self._decision is not None
        started = time.perf_counter()
        try:
            yield
        except EngineError:
            raise
        except AvpError as error:
            if self._mode is not None or not self._left:
                raise
            log.warning("A payload for %s was of no use: %s", self._decision.mode, error)
            self._notes.append(f"{self._decision.mode}: {error}")
        finally:
            self._seconds += time.perf_counter() - started

    def read(self, payload: Payload) -> None:
        """Make a payload a context, where anything is left of it."""
        assert self._decision is not None
        mode, own = self._decision.mode, self._own
        self._moved += _size(payload)
        if mode == "text":
            said = (SpokenMessage(self._offer.speaker, _text(payload)),)
            self._made = own.read(Thought("", "", (), said)), said, mode
        elif mode == "projection":
            if isinstance(payload, Thought):
                self._moved += self._take_thought(payload)
            else:
                self._take_thought(Thought.decode(memoryview(_data(payload))))
        else:
            self._made = own.accept(self._context(payload)), (), mode

    def taken(self) -> Taken:
        """What came over; once `done`."""
        assert self._decision is not None
        assert self._made is not None
        context, spoken, mode = self._made
        handoff = Handoff(
            mode=mode,
            reason=f"{self._decision.reason}; {self._why}" if self._why else self._decision.reason,
            bytes=self._moved,
            milliseconds=1e3 * self._seconds,
            notes=tuple(self._notes),
            estimated_ms=self._decision.to_metadata()["estimated_ms"],
        )
        context.attach(handoff=handoff)
        return Taken(context, spoken, handoff)

    def _decide(self) -> Decision:
        offer, mode = self._offer, self._mode
        if offer.source is None or offer.shipment is None:
            if mode not in (None, "text"):
                raise HandshakeError(f"The other side offers text only, not {mode}.")
            return Decision("text", "the other side offers text only")
        theirs = replace(offer.source, modes=tuple(known for known in offer.source.modes if known in self._left))
        ours, shipment = self._own.hello(), offer.shipment
        shaken = handshake(theirs, ours)
        if mode is not None:
            if mode not in shaken.modes:
                possible = ", ".join(shaken.modes) or "nothing"
                raise HandshakeError(f"{theirs.model} and {ours.model} can use {possible}, not {mode}.")
            return Decision(mode, "asked for")
        if self._replay is not None and "kv" in shaken.modes and "replay" in shaken.modes:
            measured = speeds(self._own, self._replay)
            shaken = handshake(theirs, replace(ours, prefill_rate=measured.prefill))
            shipment = replace(shipment, intake_seconds=(shipment.kv_bytes or 0) / measured.intake)
        return shaken.choose(shipment, offer.link)

    def _context(self, payload: Payload) -> Context:
        """The lineage that came, in the target's dtype."""
        context = payload
        if not isinstance(context, Context):
            frame = open_frame(_data(payload), key=self._offer.key, limits=self._offer.limits)
            context = decode_context(frame)
        return context if context.dtype == self._own.dtype else in_dtype(context, self._own.dtype)

    def _take_thought(self, thought: Thought) -> int:
        """With its vector where that was asked for, if it has one; else as the target is set.

        Returns:
            Bytes of what is left of it.
        """
        own = self._own
        if self._mode is not None and thought.distributions:
            self._made = own.project(thought), thought.messages, "projection"
            self._why = "with its vector"
            return len(thought.encode())
        choice = own.choose(thought)
        if choice.mode != "text":
            receive = own.project if choice.mode == "projection" else own.read
            self._made = receive(choice.thought), choice.thought.messages, choice.mode
        elif "text" not in self._left:
            raise ProjectionError(f"Nothing is left of the thought: {choice.reason}.")
        self._why = choice.reason
        return len(choice.thought.encode())


@dataclass(frozen=True)
class Speeds:
    """What an engine does with a context that comes.

    Attributes:
        prefill: Positions per second that it prefills.
        intake: Bytes per second of a KV-cache that it checks and takes in.
    """

    prefill: float
    intake: float


_speeds: WeakKeyDictionary[Crossing, Speeds] = WeakKeyDictionary()


def speeds(own: Crossing, replay: Replay) -> Speeds:
    """How fast a model's engine is; measured once, at the first call."""
    if own not in _speeds:
        ids = own.read(Thought("", "", (), (SpokenMessage("user", _MEASURED_TEXT),))).token_ids()
        ids = (ids * (_MEASURED_POSITIONS // len(ids) + 1))[:_MEASURED_POSITIONS]
        # each time in another order: equal beginnings are not computed again
        orders = [ids[turn:] + ids[:turn] for turn in range(1, 1 + _MEASURED_TIMES)]
        measured = [_measure(own, replay, order) for order in orders]
        _speeds[own] = Speeds(max(one.prefill for one in measured), max(one.intake for one in measured))
    return _speeds[own]


def _measure(own: Crossing, replay: Replay, ids: tuple[int, ...]) -> Speeds:
    made = replay(Context(own.fingerprint, own.dtype, (TokenSegment(ids),)))
    usage = made.usage
    assert usage is not None, "what an engine made says what it cost"
    frame = encode_context(made, key=_NO_KEY).assemble()
    started = time.perf_counter()
    own.accept(decode_context(open_frame(frame, key=_NO_KEY)))
    return Speeds(
        prefill=(usage.prompt_tokens - usage.positions_reused) / max(usage.prefill_seconds, 1e-6),
        intake=len(frame) / (time.perf_counter() - started),
    )


def _size(payload: Payload) -> int:
    """Bytes that it takes to move; of a thought at hand, only what is left of it would be moved."""
    if isinstance(payload, Context):
        return payload.nbytes
    if isinstance(payload, Thought):
        return 0
    return len(payload.encode() if isinstance(payload, str) else payload)


def _text(payload: Payload) -> str:
    if isinstance(payload, str):
        return payload
    try:
        return _data(payload).decode()
    except UnicodeDecodeError as error:
        raise TransportError("The text that was offered is not UTF-8.") from error


def _data(payload: Payload) -> bytes | bytearray:
    assert isinstance(payload, bytes | bytearray), "what travels is bytes"
    return payload
