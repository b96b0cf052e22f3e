"""The verbs that every engine in this process has in common, and how a caller waits for what they set going.

    EngineVerbs                          think, generate, stream, replay, resolve, and their asynchronous twins
    Work                                 what an engine makes of a call: checked, not started
    wait(work), await_result(work)       start it, and take the one result
    ChunkStream(work), achunks(work)     start it, and take pieces as they come

Whoever gives up (an exception, a closed or dropped stream, a cancelled task) cancels the work.
"""

from __future__ import annotations

import asyncio
import queue
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import aclosing
from typing import Any, Generic, Self, TypeVar, Unpack

from avp_agents.answer.generation import Chunk, Generation
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.answer.tool_format import ToolDefinition, ToolFormat
from avp_agents.context import Context
from avp_agents.handle import ContextHandle
from avp_agents.prompt.chat_messages import Prompt
from avp_agents.prompt.plan import PromptRenderer
from avp_agents.store import ContextStore
from avp_agents.tracing import Operation, start_operation
from avp_agents.usage import Handoff, Usage

T = TypeVar("T")


class Events(Generic[T]):
    """A queue from an engine's thread to its caller, who waits in a thread or on an event loop."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._tell: Callable[[], None] | None = None

    def put(self, event: T | BaseException) -> None:
        """Called from the engine's thread."""
        self._queue.put(event)
        if (tell := self._tell) is not None:
            tell()

    def get(self) -> T:
        """The next event; raises it if it is an error."""
        return _unless_error(self._queue.get())

    async def aget(self) -> T:
        """`get` without blocking the loop."""
        loop = asyncio.get_running_loop()
        while True:
            arrived = asyncio.Event()

            def tell(arrived: asyncio.Event = arrived) -> None:
                if not loop.is_closed():  # a loop that was closed no longer listens
                    loop.call_soon_threadsafe(arrived.set)

            self._tell = tell
            try:
                return _unless_error(self._queue.get_nowait())
            except queue.Empty:
                await arrived.wait()


class Work(ABC, Generic[T]):
    """A request of a caller.

    Attributes:
        events: What came of it: the context; or chunks, the last of which has the generation; or an error.
    """

    def __init__(self, events: Events[T]) -> None:
        self.events = events

    @abstractmethod
    def start(self) -> None:
        """Hand it to the engine.

        Raises:
            EngineBusyError, EngineClosedError, KvMemoryError
        """

    @abstractmethod
    def cancel(self) -> None:
        """Let it end; what has ended already is left alone."""


def wait(work: Work[Context], operation: Operation) -> Context:
    """Run work and wait for the context that it ends with; an interrupt cancels it."""
    work.start()
    try:
        return _noted(work.events.get(), operation)
    finally:
        work.cancel()


async def await_result(work: Work[Context], operation: Operation) -> Context:
    """`wait` without blocking the loop; cancelling the task cancels the work."""
    work.start()
    try:
        return _noted(await work.events.aget(), operation)
    finally:
        work.cancel()


class ChunkStream(Iterator[Chunk]):
    """The chunks of one answer. Closing or dropping it ends the request."""

    def __init__(self, work: Work[Chunk], operation: Operation) -> None:
        self._events, self._operation = work.events, operation
        self._ended = False
        work.start()
        self._give_up = weakref.finalize(self, _leave, work, operation)
        self._give_up.atexit = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._ended or not self._give_up.alive:
            raise StopIteration
        try:
            chunk = _noted_chunk(self._events.get(), self._operation)
        except BaseException as error:
            self._operation.fail(error)
            self.close()
            raise
        self._ended = chunk.generation is not None
        if self._ended:
            self._operation.end()
        return chunk

    def close(self) -> None:
        """End the request; no chunk follows."""
        self._give_up()


async def achunks(work: Work[Chunk], operation: Operation) -> AsyncGenerator[Chunk, None]:
    """`ChunkStream` on an event loop; closing the generator or cancelling its task ends the request."""
    work.start()
    try:
        while True:
            chunk = _noted_chunk(await work.events.aget(), operation)
            yield chunk
            if chunk.generation is not None:
                return
    finally:
        work.cancel()


def _leave(work: Work[Chunk], operation: Operation) -> None:
    work.cancel()
    operation.end()


def _unless_error(event: T | BaseException) -> T:
    if isinstance(event, BaseException):
        raise event
    return event


def _noted(context: Context, operation: Operation) -> Context:
    operation.result(context.usage or Usage(), context.handoff or Handoff())
    return context


def _noted_chunk(chunk: Chunk, operation: Operation) -> Chunk:
    if (generation := chunk.generation) is not None:
        operation.result(generation.usage, generation.handoff, generation.finish_reason)
    return chunk


class EngineVerbs(ABC):
    """What such engines share. An engine builds the work of a verb, fully checked; see `avp_agents.engine.protocol`.

    Attributes:
        model_path: The name or folder that the model was loaded from.
        store: Where handles are resolved.
    """

    model_path: str
    store: ContextStore
    _finalizer: weakref.finalize[..., Any]

    @abstractmethod
    def load(self) -> None:
        """Load the model now instead of at the first use."""

    @abstractmethod
    def _renderer(self) -> PromptRenderer:
        """Prompts to ids; needs no weights."""

    @abstractmethod
    def _thinking(self, prompt: Prompt, steps: int, context: Context | None, options: ThinkOptions) -> Work[Context]:
        """The work of `think`."""

    @abstractmethod
    def _answering(self, prompt: Prompt, context: Context | None, options: GenerateOptions) -> Work[Chunk]:
        """The work of `generate` and `stream`."""

    @abstractmethod
    def _replaying(self, context: Context) -> Work[Context]:
        """The work of `replay`."""

    @abstractmethod
    def _check_receivable(self, context: Context) -> None:
        """Refuse a context that no request of this engine can go on from (`FingerprintMismatchError`)."""

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls; needs the tokenizer only."""
        return self._renderer().tool_format

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Seq[ToolDefinition] = (),
    ) -> int:
        """Positions of the rendered prompt, its tools included; needs the tokenizer only."""
        return self._renderer().count(prompt, chat_template_kwargs=chat_template_kwargs, tools=tools)

    def encode(self, text: str) -> list[int]:
        """The ids of a text as message content: no template, no BOS, control tokens in it are plain text."""
        return self._renderer().encode(text)

    def think(
        self, prompt: Prompt, *, steps: int = 20, context: Context | None = None, **options: Unpack[ThinkOptions]
    ) -> Context:
        """Prefill the prompt (on top of `context`) and run latent steps; nothing is decoded.

        Args:
            prompt: Text (one user message) or chat messages.
            steps: Latent steps. 10 to 20 are usual, more than 40 degrade.
            context: A context to think on.
            **options: See `ThinkOptions`.

        Returns:
            A new context: its lineage ends in ``steps`` latent positions, its readout says what the model was about
            to say. `context.usage` and `context.handoff` tell the cost.

        Raises:
            ContextWindowError: It does not fit the window.
            FingerprintMismatchError: `context` belongs to another model or dtype.
            NumericalError: NaN or Inf came up.
            RequestTimeoutError, EngineBusyError, EngineClosedError, KvMemoryError, PromptError, ConfigurationError
        """
        self.load()
        with start_operation("think", self.model_path, {**options, "steps": steps}) as operation:
            return wait(self._thinking(prompt, steps, context, options), operation)

    def generate(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Prefill the prompt (on top of `context`) and decode an answer.

        Args:
            prompt: Text (one user message) or chat messages; a message may carry ``context``, which it then stands for.
            context: A context to generate on.
            **options: See `GenerateOptions`.

        Raises:
            As `think`.
        """
        for chunk in self.stream(prompt, context=context, **options):
            if chunk.generation is not None:
                return chunk.generation
        raise AssertionError("a stream ends with its generation")

    def stream(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> ChunkStream:
        """`generate`, token by token; closing the iterator ends the request.

        Raises:
            As `think`; what can be checked before work starts is raised at once, not at the first chunk.
        """
        self.load()
        operation = start_operation("chat", self.model_path, options)
        with operation.failing():
            return ChunkStream(self._answering(prompt, context, options), operation)

    def replay(self, context: Context) -> Context:
        """The same context with its KV-cache rebuilt (or found again): one prefill of its lineage.

        Raises:
            As `think`.
        """
        self.load()
        with start_operation("replay", self.model_path) as operation:
            return wait(self._replaying(context), operation)

    def resolve(self, handle: ContextHandle | Mapping[str, Any] | str, *, scope: str | None = None) -> Context:
        """The context a handle stands for.

        Args:
            handle: Untrusted: as graph state has it, a handle, or its id.
            scope: The scope the handle must have been minted for; None asks no question.

        Raises:
            InvalidHandleError: It is malformed.
            ContextLostError: The store does not have it.
            FingerprintMismatchError: It belongs to another model, and the engine cannot receive it.
        """
        context = self.store.get(handle, scope=scope)
        self._check_receivable(context)
        return context

    async def athink(
        self, prompt: Prompt, *, steps: int = 20, context: Context | None = None, **options: Unpack[ThinkOptions]
    ) -> Context:
        """Asynchronous `think`; cancelling the task ends the request."""
        await asyncio.to_thread(self.load)
        with start_operation("think", self.model_path, {**options, "steps": steps}) as operation:
            work = await asyncio.to_thread(self._thinking, prompt, steps, context, options)
            return await await_result(work, operation)

    async def agenerate(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Asynchronous `generate`; cancelling the task ends the request."""
        async with aclosing(self.astream(prompt, context=context, **options)) as chunks:
            async for chunk in chunks:
                if chunk.generation is not None:
                    return chunk.generation
        raise AssertionError("a stream ends with its generation")

    async def astream(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """Asynchronous `stream`; leaving the iterator ends the request."""
        await asyncio.to_thread(self.load)
        with start_operation("chat", self.model_path, options) as operation:
            work = await asyncio.to_thread(self._answering, prompt, context, options)
            async with aclosing(achunks(work, operation)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def areplay(self, context: Context) -> Context:
        """Asynchronous `replay`."""
        await asyncio.to_thread(self.load)
        with start_operation("replay", self.model_path) as operation:
            return await await_result(await asyncio.to_thread(self._replaying, context), operation)

    async def aresolve(self, handle: ContextHandle | Mapping[str, Any] | str, *, scope: str | None = None) -> Context:
        """Asynchronous `resolve`."""
        return await asyncio.to_thread(self.resolve, handle, scope=scope)

    def close(self) -> None:
        """Stop the engine and free what it holds; running requests end with `EngineClosedError`."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
