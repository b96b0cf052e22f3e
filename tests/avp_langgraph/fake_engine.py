"""An engine without weights: prompts, lineages, handoffs and errors are real, the model's words come from a digest.

The same lineage always gets the same words, and any other lineage other words, so that a test sees at once whether an
answer was made on the context it should have been made on.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import torch

from avp_agents.answer.generation import Chunk, Generation, TokenLogprob
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.answer.tool_format import GENERIC, ToolDefinition, ToolFormat
from avp_agents.context import Context, LatentRecipe, LatentSegment, SplicedSegment, TokenSegment
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.errors import ConfigurationError, ContextWindowError, FingerprintMismatchError, PromptError
from avp_agents.handle import ContextHandle
from avp_agents.kv_cache import HostKv
from avp_agents.prompt.chat_messages import Prompt, read_messages
from avp_agents.prompt.continuation import Line, LineageWalk
from avp_agents.store import ContextStore, MemoryStore, Namespace
from avp_agents.usage import Handoff, Usage

HIDDEN = 4
END_OF_TURN = 1
_ROLES = {"system": 2, "user": 3, "assistant": 4, "tool": 5}
_FIRST_CHARACTER = 10
_WORDS = ("apple", "brook", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "lagoon",
          "meadow", "north", "ocean", "prairie")  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a test can ask about one call of the engine."""

    kind: str
    base: Context | None
    text: str
    options: Mapping[str, Any]


@dataclass
class FakeEngine:
    """Implements `avp_agents.engine.protocol.Engine`.

    Attributes:
        requests: Every call that reached the model, in order.
        cancelled: How many streams were left before their end.
        delay: Seconds between two tokens of an asynchronous stream.
        reasoning: What the model says before each answer, as a reasoning model does.
    """

    model_path: str = "fake/model"
    store: ContextStore = field(default_factory=lambda: MemoryStore(namespace=Namespace("tests", b"k" * 32)))
    context_window: int = 10_000
    dtype: str = "float32"
    delay: float = 0.0
    reasoning: str = ""
    requests: list[Request] = field(default_factory=list)
    cancelled: int = 0
    closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.model_path.encode(), digest_size=32).hexdigest()

    @property
    def tool_format(self) -> ToolFormat:
        return GENERIC

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[ToolDefinition] = (),
    ) -> int:
        line = self._line(prompt, None)
        shown = len(GENERIC.tools_text(tools)) if tools else 0
        return shown + len(_render(line)) + (len(line.base) if line.base else 0)

    def encode(self, text: str) -> list[int]:
        return _characters(text)

    def think(
        self, prompt: Prompt, *, steps: int = 20, context: Context | None = None, **options: Unpack[ThinkOptions]
    ) -> Context:
        line, ids = self._prefill("think", prompt, context, steps, options)
        method, k = options.get("method") or "soft", options.get("k", 256)
        recipe = LatentRecipe(method, k, options.get("temperature", 1.0), bool(options.get("renormalise")), steps)
        start = self._context(line, ids)
        thought = LatentSegment(torch.full((steps, HIDDEN), int(_digest(start), 16) % 97, dtype=torch.float32), recipe)
        handoff, reused = _handoff(line)
        usage = Usage(prompt_tokens=len(start), positions_reused=reused, latent_steps=steps)
        return self._context(line, ids, thought, usage=usage, handoff=handoff)

    def generate(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        return [chunk.generation for chunk in self.stream(prompt, context=context, **options)][-1]  # pyright: ignore

    def stream(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[Chunk]:
        chunks = self._chunks(prompt, context, options)
        return self._noting_cancellation(chunks)

    def _noting_cancellation(self, chunks: Sequence[Chunk]) -> Generator[Chunk]:
        sent = 0
        try:
            for chunk in chunks:
                sent += 1
                yield chunk
        finally:
            self.cancelled += sent < len(chunks)

    async def athink(
        self, prompt: Prompt, *, steps: int = 20, context: Context | None = None, **options: Unpack[ThinkOptions]
    ) -> Context:
        await asyncio.sleep(self.delay)
        return self.think(prompt, steps=steps, context=context, **options)

    async def agenerate(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        return self.generate(prompt, context=context, **options)

    async def astream(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Chunk]:
        chunks, sent = self._chunks(prompt, context, options), 0
        try:
            for chunk in chunks:
                await asyncio.sleep(self.delay)
                sent += 1
                yield chunk
        finally:
            self.cancelled += sent < len(chunks)

    def join(
        self,
        contexts: Sequence[Context],
        *,
        strategy: JoinStrategy = "replay",
        timeout: float | None = None,
        source: str = "",
    ) -> Context:
        for context in contexts:
            self._check_model(context)
        with self._lock:
            self.requests.append(Request("join", None, strategy, {"contexts": tuple(contexts), "source": source}))
        first, *others = (context.lineage for context in contexts)
        tails = [(SplicedSegment(other, 0),) if strategy == "splice" else other for other in others]
        lineage = (*first, *(segment for tail in tails for segment in tail), TokenSegment((END_OF_TURN,)))
        joined = Context(self.fingerprint, self.dtype, lineage)
        handoff = Handoff("kv", f"{len(contexts)} contexts joined by {strategy}")
        joined.attach(kv=_kv(len(joined)), usage=Usage(prompt_tokens=len(joined)), handoff=handoff)
        return joined

    async def ajoin(
        self,
        contexts: Sequence[Context],
        *,
        strategy: JoinStrategy = "replay",
        timeout: float | None = None,
        source: str = "",
    ) -> Context:
        return self.join(contexts, strategy=strategy, source=source)

    def replay(self, context: Context) -> Context:
        return context.with_kv(_kv(len(context)))

    async def areplay(self, context: Context) -> Context:
        return self.replay(context)

    def resolve(self, handle: ContextHandle | Mapping[str, Any] | str, *, scope: str | None = None) -> Context:
        context = self.store.get(handle, scope=scope)
        self._check_model(context)
        return context

    async def aresolve(self, handle: ContextHandle | Mapping[str, Any] | str, *, scope: str | None = None) -> Context:
        return self.resolve(handle, scope=scope)

    def for_store(self, store: ContextStore) -> FakeEngine:
        return replace(self, store=store)

    def close(self) -> None:
        self.closed = True

    def _chunks(self, prompt: Prompt, context: Context | None, options: GenerateOptions) -> list[Chunk]:
        budget = options.get("max_tokens") or 6
        if options.get("temperature", 0) < 0:
            raise ConfigurationError("temperature must not be negative.")
        line, ids = self._prefill("generate", prompt, context, budget, options)
        start = self._context(line, ids)
        salt = f"{options.get('temperature', 0)}{options.get('seed')}" if options.get("temperature") else ""
        digest = hashlib.blake2b((_digest(start) + salt).encode()).digest()
        words = [_WORDS[byte % len(_WORDS)] for byte in digest[: min(6, budget)]]
        text, stopped = _cut_at_stop(" ".join(words), options.get("stop"))
        pieces = [piece + " " for piece in text.split(" ")]
        pieces[-1] = pieces[-1][:-1]
        answer = TokenSegment((*_characters(self.reasoning + text), END_OF_TURN))
        handoff, reused = _handoff(line)
        usage = Usage(
            prompt_tokens=len(start),
            positions_reused=reused,
            completion_tokens=len(words) + len(self.reasoning.split()),
            reasoning_tokens=len(self.reasoning.split()),
        )
        asked = options.get("logprobs") is not None
        generation = Generation(
            text=text,
            token_ids=answer.token_ids,
            context=self._context(line, ids, answer, usage=usage, handoff=handoff),
            usage=usage,
            handoff=handoff,
            finish_reason="stop" if stopped or len(words) == 6 else "length",
            logprobs=tuple(TokenLogprob(7, piece, -0.5, ((7, -0.5),)) for piece in pieces) if asked else None,
            reasoning=self.reasoning,
        )
        thought = [Chunk("", reasoning=character) for character in self.reasoning]
        return thought + [Chunk(piece) for piece in pieces if piece] + [Chunk("", generation=generation)]

    def _prefill(
        self, kind: str, prompt: Prompt, context: Context | None, requested: int, options: Mapping[str, Any]
    ) -> tuple[Line, tuple[int, ...]]:
        line = self._line(prompt, context)
        for used in (line.base, context):
            if used is not None:
                self._check_model(used)
        ids = _render(line)
        inherited = len(line.base) if line.base else 0
        if inherited + len(ids) + requested > self.context_window:
            raise ContextWindowError(
                window=self.context_window, context=inherited, prompt=len(ids), requested=requested
            )
        with self._lock:
            self.requests.append(Request(kind, line.base, _text(ids), dict(options)))
        return line, ids

    def _line(self, prompt: Prompt, context: Context | None) -> Line:
        turns = read_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        if not turns and context is None:
            raise PromptError("The prompt has no messages; pass at least one.")
        return LineageWalk(turns, _render).follow(context)

    def _context(self, line: Line, ids: tuple[int, ...], *more: Any, **attached: Any) -> Context:
        lineage = (*(line.base.lineage if line.base else ()), TokenSegment(ids), *more)
        context = Context(self.fingerprint, self.dtype, lineage)
        context.attach(kv=_kv(len(context)), **attached)
        return context

    def _check_model(self, context: Context) -> None:
        if context.fingerprint != self.fingerprint:
            raise FingerprintMismatchError("The context was made by another model.")


def _render(line: Line) -> tuple[int, ...]:
    """The pending turns, each between its role and an end of turn, and an open assistant turn."""
    last = line.base.lineage[-1] if line.base else None
    is_open = last is not None and not (isinstance(last, TokenSegment) and last.token_ids[-1] == END_OF_TURN)
    ids = [END_OF_TURN] if is_open else []
    for message in line.messages:
        ids += [_ROLES[message["role"]], *_characters(message["content"] or ""), END_OF_TURN]
    return (*ids, _ROLES["assistant"])


def _characters(text: str) -> list[int]:
    return [_FIRST_CHARACTER + ord(character) for character in text]


def _text(ids: Sequence[int]) -> str:
    return "".join(chr(id_ - _FIRST_CHARACTER) if id_ >= _FIRST_CHARACTER else "|" for id_ in ids)


def _digest(context: Context) -> str:
    return hashlib.blake2b(context.recipe_id.encode(), digest_size=8).hexdigest()


def _kv(length: int) -> HostKv:
    return HostKv(((torch.zeros(1, length, 1), torch.zeros(1, length, 1)),))


def _handoff(line: Line) -> tuple[Handoff, int]:
    if line.base is None:
        return Handoff(), 0
    relation, reused = "continuation" if line.continues else "handoff", min(line.base.kv_len, len(line.base))
    if reused < len(line.base):
        missing = len(line.base) - reused
        return Handoff("replay", relation, bytes=line.base.nbytes, positions_replayed=missing), reused
    return Handoff("kv", relation, positions_reused=reused), reused


def _cut_at_stop(text: str, stop: str | Sequence[str] | None) -> tuple[str, bool]:
    stops = [stop] if isinstance(stop, str) else stop or []
    places = [place for string in stops if (place := text.find(string)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
