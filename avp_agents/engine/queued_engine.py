"""An engine whose requests run in a queue: every call is one that is built, submitted, and waited for."""

from __future__ import annotations

import asyncio
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, Self, Unpack

from avp_agents.answer.generation import Chunk, Generation
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.answer.tool_format import ToolDefinition, ToolFormat
from avp_agents.context import Context
from avp_agents.engine.core.request import Event
from avp_agents.engine.delivery import ChunkStream, Queue, await_context, stream_chunks, wait_for_context
from avp_agents.handle import ContextHandle
from avp_agents.prompt.chat_messages import Prompt
from avp_agents.store import ContextStore
from avp_agents.tracing import start_operation

if TYPE_CHECKING:
    from avp_agents.prompt.plan import PromptRenderer

Deliver = Callable[[Event], None]


class Requests(Protocol):
    """Makes what the queue runs. Everything that can be checked before work starts is checked here."""

    def thinking(
        self, prompt: Prompt, steps: int, context: Context | None, options: ThinkOptions, deliver: Deliver
    ) -> Any:
        """A think request."""
        ...

    def answering(self, prompt: Prompt, context: Context | None, options: GenerateOptions, deliver: Deliver) -> Any:
        """A generate request."""
        ...

    def replaying(self, context: Context, deliver: Deliver) -> Any:
        """A replay request."""
        ...

    def check_receivable(self, context: Context) -> None:
        """Refuse a context that no request of this engine can go on from."""
        ...


class QueuedEngine(ABC):
    """What such engines share. See `avp_agents.engine.protocol`.

    Attributes:
        model_path: The name or folder that the model was loaded from.
        store: Where handles are resolved.
    """

    model_path: str
    store: ContextStore
    _finalizer: weakref.finalize[..., Any]

    @abstractmethod
    def _started(self) -> Queue[Any]:
        """Who runs requests; the first call loads the model."""

    @abstractmethod
    def _builder(self) -> Requests:
        """Who makes requests."""

    @abstractmethod
    def _renderer(self) -> PromptRenderer:
        """Prompts to ids."""

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

    def load(self) -> None:
        """Load the model now instead of at the first use."""
        self._started()

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
        queue, build = self._started(), self._builder().thinking
        return wait_for_context(
            queue,
            lambda deliver: build(prompt, steps, context, options, deliver),
            start_operation("think", self.model_path, {**options, "steps": steps}),
        )

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
        queue, build = self._started(), self._builder().answering
        return ChunkStream(
            queue,
            lambda deliver: build(prompt, context, options, deliver),
            start_operation("chat", self.model_path, options),
        )

    def replay(self, context: Context) -> Context:
        """The same context with its KV-cache rebuilt (or found again): one prefill of its lineage.

        Raises:
            As `think`.
        """
        queue, build = self._started(), self._builder().replaying
        operation = start_operation("replay", self.model_path)
        return wait_for_context(queue, lambda deliver: build(context, deliver), operation)

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
        self._builder().check_receivable(context)
        return context

    async def athink(
        self, prompt: Prompt, *, steps: int = 20, context: Context | None = None, **options: Unpack[ThinkOptions]
    ) -> Context:
        """Asynchronous `think`; cancelling the task ends the request."""
        queue = await asyncio.to_thread(self._started)
        build = self._builder().thinking
        operation = start_operation("think", self.model_path, {**options, "steps": steps})
        return await await_context(queue, lambda deliver: build(prompt, steps, context, options, deliver), operation)

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
        queue = await asyncio.to_thread(self._started)
        build = self._builder().answering
        operation = start_operation("chat", self.model_path, options)
        stream = stream_chunks(queue, lambda deliver: build(prompt, context, options, deliver), operation)
        async with aclosing(stream):
            async for chunk in stream:
                yield chunk

    async def areplay(self, context: Context) -> Context:
        """Asynchronous `replay`."""
        queue = await asyncio.to_thread(self._started)
        build = self._builder().replaying
        operation = start_operation("replay", self.model_path)
        return await await_context(queue, lambda deliver: build(context, deliver), operation)

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
