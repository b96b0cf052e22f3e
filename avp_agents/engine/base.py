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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, Unpack, runtime_checkable

from avp_agents.context import Context, LatentMethod
from avp_agents.handle import ContextHandle
from avp_agents.usage import Handoff, Usage

if TYPE_CHECKING:
    from avp_agents.engine.grammar import Grammar
    from avp_agents.engine.tool_format import ToolDefinition, ToolFormat
    from avp_agents.store.base import ContextStore

JoinStrategy = Literal["replay", "splice", "text"]
"""How contexts are joined; see `avp_agents.engine.join`."""

FinishReason = Literal["stop", "length", "cancelled"]

Message = Mapping[str, Any]
"""A chat message: ``role``, ``content`` and optionally ``context`` (a `Context` that the message stands for)."""

Prompt = str | Sequence[Message]
"""A string (one user message, or raw text where the tokenizer has no chat template) or chat messages."""


class GenerateOptions(TypedDict, total=False):
    """Options of `generate` and `stream`.

    Attributes:
        max_tokens: Most tokens to decode. Default 512, or what the window leaves if that is less.
        min_tokens: End-of-sequence and stops are ignored for so many tokens. Default 0.
        temperature: 0 (the default) is greedy.
        top_p: Nucleus mass in (0, 1]. Default 1.
        top_k: Only so many most likely tokens; 0 (the default) is all.
        min_p: Only tokens at least `min_p` times as likely as the most likely. Default 0.
        repetition_penalty: CTRL's penalty on all ids of prompt and answer; 1 (the default) is none.
        seed: Seed of this request's own random stream; independent of what else is in the batch.
        logprobs: Return the log-probability of each token and of the so many most likely ones.
        stop: Strings that end the answer; cut from it, also across token boundaries.
        stop_token_ids: Ids that end the answer, beside the model's own end-of-sequence ids.
        skip_special_tokens: Leave special tokens out of the text. Default True; tool calls may be marked with them.
        tools: Tools that the model is shown, as chat templates take them. `grammar` lets it call them.
        grammar: What the answer may be; it ends where the grammar ends. Needs ``avp-agents[tools]``.
        chat_template_kwargs: Options of the chat template for this request, over the engine's own; for example
            ``{"enable_thinking": False}``.
        timeout: Seconds until `RequestTimeoutError`, waiting in the queue included.
        source: Who asks; admission is fair between sources.
    """

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    logprobs: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]
    skip_special_tokens: bool
    tools: Sequence[ToolDefinition]
    grammar: Grammar | None
    chat_template_kwargs: Mapping[str, Any] | None
    timeout: float | None
    source: str


class ThinkOptions(TypedDict, total=False):
    """Options of `think`.

    Attributes:
        method: ``"soft"``, ``"ridge"`` or ``"rescale"``; by default what suits the model (soft where the head is tied
            to the input embeddings, else ridge).
        k: Most likely tokens in the soft embedding; None is the whole vocabulary. Default 256.
        temperature: Softmax temperature of the soft embedding. Default 1.
        renormalise: Rescale each latent embedding to the mean norm of the input embeddings. Default: yes for ridge
            and rescale, no for soft.
        stop_cosine: Stop when consecutive hidden states are more alike than this.
        stop_entropy: Stop when the entropy (nats) of the next token falls below this.
        tools: Tools that the model is shown, as in `GenerateOptions`.
        chat_template_kwargs: Options of the chat template for this request, over the engine's own.
        timeout: Seconds until `RequestTimeoutError`, waiting in the queue included.
        source: Who asks; admission is fair between sources.
    """

    method: LatentMethod | None
    k: int | None
    temperature: float
    renormalise: bool | None
    stop_cosine: float | None
    stop_entropy: float | None
    tools: Sequence[ToolDefinition]
    chat_template_kwargs: Mapping[str, Any] | None
    timeout: float | None
    source: str


@dataclass(frozen=True)
class TokenLogprob:
    """A decoded token's log-probability (of the model's own distribution, before sampling options)."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: The decoded text, without special tokens, cut at a stop string; without what the model reasoned first.
        token_ids: The decoded ids that are in the lineage (an end-of-sequence id included).
        context: The lineage including this answer; hand it on, or generate on it again.
        usage: What it cost.
        handoff: How the given context was used.
        finish_reason: ``"stop"`` or ``"length"``.
        logprobs: One entry per decoded token, where asked for.
        reasoning: What a reasoning model wrote between ``<think>`` and ``</think>`` before the text; else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    context: Context
    usage: Usage
    handoff: Handoff
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer: of its text or of its reasoning. The last one carries the whole `Generation`."""

    text: str
    token_ids: tuple[int, ...] = ()
    generation: Generation | None = None
    logprobs: tuple[TokenLogprob, ...] = field(default=())
    reasoning: str = ""


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
