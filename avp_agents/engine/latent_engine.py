"""The latent engine on Hugging Face transformers: the public face of scheduler, KV pool and latent step."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence as Seq
from typing import Any, Self, Unpack

from avp_agents.context import Context, ContextHandle, HostKv, LatentRecipe
from avp_agents.engine.base import Chunk, GenerateOptions, Generation, Prompt, ThinkOptions
from avp_agents.engine.model_runtime import EngineSettings, ModelRuntime
from avp_agents.engine.prompt import PromptPlan
from avp_agents.engine.sampling import RowSampler, SamplingParams
from avp_agents.engine.scheduler import EngineStats
from avp_agents.engine.sequence import Answering, Event, Replaying, Request, Sequence, Thinking
from avp_agents.engine.stopping import TextStream
from avp_agents.errors import (
    AvpError,
    ConfigurationError,
    ContextWindowError,
    FingerprintMismatchError,
    StoreError,
)
from avp_agents.models import resolve_model
from avp_agents.store import ContextStore, default_store

DEGENERATE_STEPS = 40
_THINK_OPTIONS = frozenset(ThinkOptions.__annotations__)


class LatentEngine:
    """Thinks, generates and replays on an open-weight model, for many callers at once. See `avp_agents.engine.base`.

    Example:
        >>> with LatentEngine.from_pretrained() as engine:
        ...     context = engine.think("Analyze: 24 * 17 + 3", steps=20)
        ...     print(engine.generate("Solve step by step: 24 * 17 + 3", context=context).text)
    """

    def __init__(self, name_or_path: str, store: ContextStore, settings: EngineSettings) -> None:
        self.model_path = name_or_path
        self.store = store
        self._runtime = ModelRuntime(name_or_path, settings, store)
        self._finalizer = weakref.finalize(self, self._runtime.close)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        store: ContextStore | None = None,
        batch_invariant: bool = False,
        kv_pool_bytes: int | None = None,
        max_batch: int = 16,
        max_queue: int = 256,
        capture_steps: bool | None = None,
        adapters: Seq[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **model_options: Any,
    ) -> Self:
        """An engine for a model; the weights are loaded at the first use.

        Args:
            name_or_path: Hub name or folder; None is the embedded default model.
            device: Where to run; by default an accelerator if there is one.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; by default the checkpoint's, as far as the device
                runs it fast.
            store: Where handles are resolved and evicted KV-caches go; by default memory over disk in the user's
                cache folder.
            batch_invariant: Results are bit-equal alone and in company, for some speed.
            kv_pool_bytes: Size of the KV pool; by default 2 GiB on a CPU, 60 % of the free memory on an accelerator.
            max_batch: Most sequences that run at once.
            max_queue: Most requests that wait; beyond it `EngineBusyError`.
            capture_steps: Run decode and latent steps as captured graphs; by default on a single CUDA device only.
            adapters: LoRA adapters (folders or hub names), needs ``avp-agents[adapters]``.
            chat_template_kwargs: Options of the chat template, such as ``{"enable_thinking": False}``.
            **model_options: Passed to transformers: ``revision``, ``token``, ``local_files_only``, ``device_map``,
                ``quantization_config``, ``gguf_file``, ...

        Raises:
            ModelNotFoundError: No name was given, and no source has the default model.
            ConfigurationError: An option is out of range.
        """
        if max_batch < 1 or max_queue < 1:
            raise ConfigurationError("max_batch and max_queue must be at least 1.")
        settings = EngineSettings(
            device=device,
            dtype=dtype,
            batch_invariant=batch_invariant,
            kv_pool_bytes=kv_pool_bytes,
            max_batch=max_batch,
            max_queue=max_queue,
            capture_steps=capture_steps,
            adapters=tuple(adapters),
            chat_template_kwargs=dict(chat_template_kwargs or {}),
            model_options=dict(model_options),
        )
        return cls(resolve_model(name_or_path), store if store is not None else default_store(), settings)

    @property
    def fingerprint(self) -> str:
        """Digest of weights, architecture and tokenizer; loads the weights."""
        return self._runtime.loaded.fingerprint

    @property
    def dtype(self) -> str:
        """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        return self._runtime.loaded.dtype_name

    @property
    def context_window(self) -> int:
        """Positions the model supports."""
        return self._runtime.window

    def stats(self) -> EngineStats:
        """Positions in use, requests running and waiting."""
        return self._runtime.scheduler.stats()

    def count_tokens(self, prompt: Prompt) -> int:
        """Positions of the rendered prompt; needs the tokenizer only."""
        return self._runtime.renderer.count(prompt)

    def load(self) -> None:
        """Load the weights now instead of at the first use."""
        self._runtime.scheduler  # noqa: B018  (the property loads)

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
        return _wait_context(self, lambda deliver: self._thinking(prompt, steps, context, options, deliver))

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
    ) -> Iterator[Chunk]:
        """`generate`, token by token; closing the iterator ends the request.

        Raises:
            As `think`; what can be checked before work starts is raised at once, not at the first chunk.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        sequence = self._answering(prompt, context, options, events.put)
        scheduler = self._runtime.scheduler
        scheduler.submit(sequence)

        def chunks() -> Iterator[Chunk]:
            try:
                while True:
                    chunk = _checked(events.get())
                    assert isinstance(chunk, Chunk)
                    yield chunk
                    if chunk.generation is not None:
                        return
            finally:
                scheduler.cancel(sequence)

        return _ClosingIterator(chunks(), lambda: scheduler.cancel(sequence))

    def replay(self, context: Context) -> Context:
        """The same context with its KV-cache rebuilt (or found again): one prefill of its lineage.

        Raises:
            As `think`.
        """
        return _wait_context(self, lambda deliver: self._replaying(context, deliver))

    def resolve(self, handle: ContextHandle | Mapping[str, Any] | str, *, scope: str | None = None) -> Context:
        """The context a handle stands for.

        Args:
            handle: Untrusted: as graph state has it, a handle, or its id.
            scope: The scope the handle must have been minted for; None asks no question.

        Raises:
            InvalidHandleError: It is malformed.
            ContextLostError: The store does not have it.
            FingerprintMismatchError: It belongs to another model or dtype.
        """
        context = self.store.get(handle, scope=scope)
        self._check_model(context)
        return context

    async def athink(
        self, prompt: Prompt, *, steps: int = 20, context: Context | None = None, **options: Unpack[ThinkOptions]
    ) -> Context:
        """Asynchronous `think`; cancelling the task frees the sequence."""
        return await _await_context(self, lambda deliver: self._thinking(prompt, steps, context, options, deliver))

    async def agenerate(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Asynchronous `generate`; cancelling the task frees the sequence."""
        chunks = self.astream(prompt, context=context, **options)
        try:
            async for chunk in chunks:
                if chunk.generation is not None:
                    return chunk.generation
        finally:
            await chunks.aclose()
        raise AssertionError("a stream ends with its generation")

    async def astream(
        self, prompt: Prompt, *, context: Context | None = None, **options: Unpack[GenerateOptions]
    ):
        """Asynchronous `stream`; leaving the iterator frees the sequence."""
        events = _AsyncEvents()
        sequence = await asyncio.to_thread(self._answering, prompt, context, options, events.put)
        scheduler = self._runtime.scheduler
        scheduler.submit(sequence)
        try:
            while True:
                chunk = _checked(await events.get())
                assert isinstance(chunk, Chunk)
                yield chunk
                if chunk.generation is not None:
                    return
        finally:
            scheduler.cancel(sequence)

    async def areplay(self, context: Context) -> Context:
        """Asynchronous `replay`."""
        return await _await_context(self, lambda deliver: self._replaying(context, deliver))

    async def aresolve(self, handle: ContextHandle | Mapping[str, Any] | str, *, scope: str | None = None) -> Context:
        """Asynchronous `resolve`."""
        return await asyncio.to_thread(self.resolve, handle, scope=scope)

    def close(self) -> None:
        """Stop the engine and free its memory; running requests end with `EngineClosedError`."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _thinking(
        self,
        prompt: Prompt,
        steps: int,
        context: Context | None,
        options: ThinkOptions,
        deliver: Callable[[Event], None],
    ) -> Sequence:
        if unknown := sorted(set(options) - _THINK_OPTIONS):
            known = ", ".join(ThinkOptions.__annotations__)
            raise ConfigurationError(f"Unknown option {unknown[0]!r}; known options: {known}.")
        runtime = self._runtime
        shared = ("timeout", "source")
        recipe = runtime.latent_step.recipe(steps, **{k: v for k, v in options.items() if k not in shared})
        if steps > DEGENERATE_STEPS:
            warnings.warn(f"{steps} latent steps: quality falls from {DEGENERATE_STEPS} on.", stacklevel=4)
        plan = self._plan(prompt, context)
        self._check_window(plan, recipe.steps)
        request = self._request(plan, options.get("timeout"), options.get("source"), deliver)
        return Thinking(request, recipe, _looks_at_logits(runtime, recipe))

    def _answering(
        self, prompt: Prompt, context: Context | None, options: GenerateOptions, deliver: Callable[[Event], None]
    ) -> Sequence:
        runtime = self._runtime
        vocabulary = runtime.loaded.vocabulary
        stop_ids = runtime.renderer.stop_ids
        params = SamplingParams.from_options(options, vocab_limit=vocabulary.size, eos_token_ids=stop_ids)
        plan = self._plan(prompt, context)
        max_tokens = params.token_budget(runtime.window - len(plan))
        self._check_window(plan, max(1, max_tokens))
        request = self._request(plan, options.get("timeout"), options.get("source"), deliver)
        base_ids = plan.base.token_ids() if plan.base is not None else ()
        sampler = RowSampler(params, (*base_ids, *plan.token_ids))
        text = TextStream(runtime.tokenizer, params.stop)
        return Answering(request, max_tokens, sampler, text, frozenset(params.stop_token_ids))

    def _replaying(self, context: Context, deliver: Callable[[Event], None]) -> Sequence:
        self._check_model(context)
        plan = PromptPlan(base=context, token_ids=(), relation="continuation")
        return Replaying(self._request(plan, None, None, deliver))

    def _plan(self, prompt: Prompt, context: Context | None) -> PromptPlan:
        plan = self._runtime.renderer.plan(prompt, context)
        for used in (plan.base, plan.reuse):
            if used is not None:
                self._check_model(used)
        return plan

    def _request(
        self, plan: PromptPlan, timeout: float | None, source: str | None, deliver: Callable[[Event], None]
    ) -> Request:
        if timeout is not None and timeout <= 0:
            raise ConfigurationError(f"timeout must be positive, not {timeout}.")
        loaded = self._runtime.loaded
        return Request(
            model=(loaded.fingerprint, loaded.dtype_name),
            base=plan.base,
            prompt_ids=plan.token_ids,
            relation=plan.relation,
            notes=plan.notes,
            prefix=plan.reuse,
            host_kv=self._stored_kv(plan.base or plan.reuse),
            deliver=deliver,
            source=source or "",
            deadline=time.monotonic() + timeout if timeout is not None else None,
        )

    def _stored_kv(self, context: Context | None) -> HostKv | None:
        """The KV-cache of a context that is not in the pool, if its store has it."""
        if context is None:
            return None
        kv = context.kv
        if kv is None and (handle := context.handle) is not None:
            try:
                kv = self.store.get(handle).kv
            except StoreError:
                return None
        return kv if isinstance(kv, HostKv) else None

    def _check_model(self, context: Context) -> None:
        loaded = self._runtime.loaded
        if context.fingerprint != loaded.fingerprint:
            raise FingerprintMismatchError(
                f"The context was made by model {context.fingerprint[:16]}, this engine runs {loaded.fingerprint[:16]} "
                f"({self.model_path}). Use the engine that made it, or hand its text over."
            )
        if context.dtype != loaded.dtype_name:
            raise FingerprintMismatchError(
                f"The context was made in {context.dtype}, this engine runs {loaded.dtype_name}; give both one dtype."
            )

    def _check_window(self, plan: PromptPlan, requested: int) -> None:
        window = self._runtime.window
        if len(plan) + requested > window:
            context = len(plan.base) if plan.base is not None else 0
            raise ContextWindowError(
                window=window, context=context, prompt=len(plan.token_ids), requested=requested
            )


def _looks_at_logits(runtime: ModelRuntime, recipe: LatentRecipe) -> bool:
    """Whether every step needs logits: for f, for a stopping rule, or for the readout of a run that may end early."""
    return runtime.latent_step.needs_logits(recipe) or recipe.stop_cosine is not None


def _checked(event: Event) -> Chunk | Context:
    if isinstance(event, BaseException):
        raise event
    return event


def _wait_context(engine: LatentEngine, make: Callable[[Callable[[Event], None]], Sequence]) -> Context:
    """Submit, and wait for the one event."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    sequence = make(events.put)
    scheduler = engine._runtime.scheduler
    scheduler.submit(sequence)
    try:
        context = _checked(events.get())
    except AvpError:
        raise
    except BaseException:
        scheduler.cancel(sequence)
        raise
    assert isinstance(context, Context)
    return context


async def _await_context(engine: LatentEngine, make: Callable[[Callable[[Event], None]], Sequence]) -> Context:
    """`_wait_context` without blocking the loop."""
    events = _AsyncEvents()
    sequence = await asyncio.to_thread(make, events.put)
    scheduler = engine._runtime.scheduler
    scheduler.submit(sequence)
    try:
        context = _checked(await events.get())
    except asyncio.CancelledError:
        scheduler.cancel(sequence)
        raise
    assert isinstance(context, Context)
    return context


class _AsyncEvents:
    """A queue that the scheduler's thread fills and an event loop reads."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Called from the scheduler's thread; a loop that was closed no longer listens."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def get(self) -> Event:
        """The next event."""
        return await self._queue.get()


class _ClosingIterator(Iterator[Chunk]):
    """Ends the request also when the caller drops the iterator before its first chunk."""

    def __init__(self, chunks: Iterator[Chunk], cancel: Callable[[], None]) -> None:
        self._chunks = chunks
        self._finalizer = weakref.finalize(self, cancel)
        self._finalizer.atexit = False

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """End the request."""
        self._finalizer()


__all__ = ["AsyncIterator", "LatentEngine"]
