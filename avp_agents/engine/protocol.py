"""The Engine protocol: what callers ask of a latent engine and what they get back.

    think(prompt)                 prefill, then latent steps            -> Context
    generate(prompt, context=)    prefill on top of a context, decode   -> Generation
    stream(prompt, context=)      the same, token by token              -> Iterator[Chunk]
    replay(context)               rebuild a lost KV-cache               -> Context
    join([context, ...])          several contexts as one               -> Context
    resolve(handle)               a handle's context, from the store    -> Context

Each has an asynchronous twin: athink, agenerate, astream, areplay, ajoin, aresolve.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, Unpack, runtime_checkable

from avp_agents.answer.generation import Chunk, Generation
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.context import Context
from avp_agents.handle import ContextHandle
from avp_agents.prompt.chat_messages import Prompt

if TYPE_CHECKING:
    from avp_agents.answer.tool_format import ToolDefinition, ToolFormat
    from avp_agents.store.base import ContextStore

JoinStrategy = Literal["replay", "splice", "text"]
"""How contexts are joined; see `avp_agents.engine.join`."""


class Chunks(Iterator[Chunk], Protocol):
    """The pieces of a streamed answer; closing it before its end frees the sequence."""

    def close(self) -> None:
        """End the request; no chunk follows."""
        ...


@runtime_checkable
class Engine(Protocol):
    """What every engine offers; see the module's summary."""

    @property
    def fingerprint(self) -> str:
        """Digest of weights, architecture and tokenizer; loads the weights if they are not loaded yet."""
        ...

    @property
    def dtype(self) -> str:
        """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        ...

    @property
    def model_path(self) -> str:
        """The name or folder the model was loaded from."""
        ...

    @property
    def context_window(self) -> int:
        """Positions the model supports."""
        ...

    @property
    def store(self) -> ContextStore:
        """Where handles are resolved."""
        ...

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[ToolDefinition] = (),
    ) -> int:
        """Positions of the rendered prompt, its tools included."""
        ...

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls; needs no weights."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text as message content: no template, no BOS, control tokens in it are plain text."""
        ...

    def think(
        self, prompt: Prompt, *, steps: int = 20, context: Context | None = None, **options: Unpack[ThinkOptions]
    ) -> Context:
        """Prefill the prompt (on top of `context`) and run latent steps."""
        ...

    def generate(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Prefill the prompt (on top of `context`) and decode an answer."""
        ...

    def stream(self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]) -> Chunks:
        """`generate`, token by token; closing the iterator frees the sequence."""
        ...

    def replay(self, context: Context) -> Context:
        """The same context with its KV-cache rebuilt from the lineage."""
        ...

    def join(
        self,
        contexts: Sequence[Context],
        *,
        strategy: JoinStrategy = "replay",
        timeout: float | None = None,
        source: str = "",
    ) -> Context:
        """Several contexts as one that ends in a whole turn; its handoff says which strategy ran."""
        ...

    def resolve(self, handle: ContextHandle | Mapping[str, Any] | str, *, scope: str | None = None) -> Context:
        """The context a handle stands for, checked against this engine's fingerprint and dtype."""
        ...

    async def athink(
        self, prompt: Prompt, *, steps: int = 20, context: Context | None = None, **options: Unpack[ThinkOptions]
    ) -> Context:
        """Asynchronous `think`."""
        ...

    async def agenerate(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Asynchronous `generate`; cancelling the task frees the sequence."""
        ...

    def astream(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """Asynchronous `stream`; closing the generator frees the sequence."""
        ...

    async def areplay(self, context: Context) -> Context:
        """Asynchronous `replay`."""
        ...

    async def ajoin(
        self,
        contexts: Sequence[Context],
        *,
        strategy: JoinStrategy = "replay",
        timeout: float | None = None,
        source: str = "",
    ) -> Context:
        """Asynchronous `join`."""
        ...

    async def aresolve(self, handle: ContextHandle | Mapping[str, Any] | str, *, scope: str | None = None) -> Context:
        """Asynchronous `resolve`."""
        ...

    def close(self) -> None:
        """Stop the engine and free its memory; running requests end with `EngineClosedError`."""
        ...
