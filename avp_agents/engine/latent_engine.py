"""The latent engine on Hugging Face transformers: the public face of scheduler, KV pool and latent step."""

from __future__ import annotations

import asyncio
import copy
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, Self

from typing_extensions import override

from avp_agents.answer.generation import Chunk
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.context import Context
from avp_agents.crossing.sides import Crossing, Reread
from avp_agents.engine.core.kv_pool import Owner
from avp_agents.engine.core.scheduler import EngineStats
from avp_agents.engine.loading.source import InMemory, Pretrained
from avp_agents.engine.local_engine import LocalEngine, add_engine
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.engine.requests import RequestBuilder
from avp_agents.engine.runtime import ModelRuntime
from avp_agents.engine.verbs import Work, await_result, wait
from avp_agents.models import resolve_model
from avp_agents.prompt.chat_messages import Prompt
from avp_agents.prompt.plan import PromptRenderer
from avp_agents.store import ContextStore, default_store
from avp_agents.tracing import start_operation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LatentEngine(LocalEngine):
    """Thinks, generates and replays on an open-weight model, for many callers at once (`avp_agents.engine.protocol`).

    Example:
        >>> with LatentEngine.from_pretrained() as engine:
        ...     context = engine.think("Analyze: 24 * 17 + 3", steps=20)
        ...     print(engine.generate("Solve step by step: 24 * 17 + 3", context=context).text)
    """

    def __init__(self, runtime: ModelRuntime, store: ContextStore) -> None:
        self.model_path = runtime.name
        self.store = store
        self._runtime = runtime
        self._owner = Owner(runtime.offload_to(store))
        self._builder: RequestBuilder | None = None
        self._finalizer = weakref.finalize(self, self._runtime.close)
        # an engine that shares its runtime keeps the one alive whose end closes it
        self._first: Self | None = None
        add_engine(self)

    @override
    def for_store(self, store: ContextStore) -> Self:
        """This engine for another tenant: the same weights, batches and KV memory, with a store of its own.

        Nothing is shared between the two: a KV-cache serves only requests of the store that it belongs to. Closing
        either of them closes both.
        """
        tenant = copy.copy(self)
        tenant.store = store
        tenant._owner, tenant._builder = Owner(self._runtime.offload_to(store)), None
        tenant._first = self
        return tenant

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
        reread: Reread = True,
        project_vectors: bool = False,
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
            batch_invariant: Results are bit-equal alone and in company (of engines with the same `max_batch`). Every
                step is then computed in the shape of `max_batch` rows, so choose that as large as the company is.
            kv_pool_bytes: Size of the KV pool; by default 2 GiB on a CPU, 60 % of the free memory on an accelerator.
            max_batch: Most sequences that run at once.
            max_queue: Most requests that wait; beyond it `EngineBusyError`.
            capture_steps: Run decode and latent steps as captured graphs; by default on a single CUDA device only.
            adapters: LoRA adapters (folders or hub names), needs ``avp-agents[adapters]``.
            chat_template_kwargs: Options of the chat template, such as ``{"enable_thinking": False}``.
            reread: What of the text that a context of another model was made from this model reads again: True is what
                users and tools said, ``"all"`` also system prompts and earlier answers, False is none.
            project_vectors: Whether the thought in such a context enters as a vector, too (`avp_agents.crossing`). It
                did not improve answers where that was measured.
            **model_options: Passed to transformers: ``revision``, ``token``, ``local_files_only``, ``device_map``,
                ``quantization_config``, ``gguf_file``, ...

        Raises:
            ModelNotFoundError: No name was given, and no source has the default model.
            ConfigurationError: An option is out of range.
        """
        runtime = ModelRuntime(
            Pretrained(resolve_model(name_or_path), device, dtype, tuple(adapters), dict(model_options)),
            batch_invariant=batch_invariant,
            kv_pool_bytes=kv_pool_bytes,
            max_batch=max_batch,
            max_queue=max_queue,
            capture_steps=capture_steps,
            chat_template_kwargs=chat_template_kwargs,
            reread=reread,
            project_vectors=project_vectors,
        )
        return cls(runtime, store if store is not None else default_store())

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        store: ContextStore | None = None,
        **settings: Any,
    ) -> Self:
        """An engine for a model that is in memory already; the engine takes it over (attention, packed weights).

        Args:
            model: A decoder-only model, placed where it is to run.
            tokenizer: Its tokenizer.
            store: As in `from_pretrained`.
            **settings: ``batch_invariant``, ``kv_pool_bytes``, ``max_batch``, ``max_queue``, ``capture_steps``,
                ``chat_template_kwargs``, ``reread``, ``project_vectors`` as in `from_pretrained`.
        """
        runtime = ModelRuntime(InMemory(model, tokenizer), **settings)
        return cls(runtime, store if store is not None else default_store())

    @property
    def fingerprint(self) -> str:
        """Digest of weights, architecture and tokenizer; loads the weights."""
        return self._runtime.loaded.fingerprint

    @property
    def dtype(self) -> str:
        """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        return self._runtime.loaded.dtype_name

    @property
    def device(self) -> torch.device:
        """Where input embeddings go in; loads the weights."""
        return self._runtime.loaded.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; loads them."""
        return self._runtime.loaded.weight_bytes

    @property
    @override
    def loaded_fingerprint(self) -> str | None:
        return self._runtime.loaded_fingerprint

    @property
    @override
    def crossing(self) -> Crossing:
        return self._runtime.crossing

    @property
    def context_window(self) -> int:
        """Positions the model supports."""
        return self._runtime.window

    def stats(self) -> EngineStats:
        """Positions in use, requests running and waiting."""
        return self._runtime.scheduler.stats()

    def join(
        self,
        contexts: Seq[Context],
        *,
        strategy: JoinStrategy = "replay",
        timeout: float | None = None,
        source: str = "",
    ) -> Context:
        """Several contexts as one, for the next agent to go on with; see `avp_agents.engine.join`.

        Args:
            contexts: Of this model, in the order in which the next agent reads them. Those that another one holds are
                left out.
            strategy: ``"replay"`` prefills the lineages as one, so that each context sees those before it.
                ``"splice"`` moves the KV-caches behind one another, without attention between them. ``"text"`` hands
                over the texts of the contexts' answers only.
            timeout: Seconds until `RequestTimeoutError`, waiting in the queue included.
            source: Who asks; admission is fair between sources.

        Returns:
            A new context. `context.handoff` says which strategy ran, what had to be computed again, and which
            contexts were left out; `context.usage` what it cost. A single context is given back as it is.

        Raises:
            ConfigurationError: There are no contexts, or there is no such strategy.
            PromptError: The strategy is ``"text"`` and no context has any; or the template renders no conversation.
            UnsupportedModelError: The strategy is ``"splice"`` and the model's keys cannot be moved exactly: its
                positions are not rotary, or depend on the sequence's length.
            ContextWindowError, FingerprintMismatchError, RequestTimeoutError, EngineBusyError, EngineClosedError,
            KvMemoryError
        """
        self.load()
        with start_operation("join", self.model_path, {"strategy": strategy}) as operation:
            return wait(self._joining(contexts, strategy, timeout, source), operation)

    def accept(self, context: Context) -> Context:
        """A context that came from outside of this process, once it was checked; use it like any other.

        Raises:
            FingerprintMismatchError: It belongs to another model or dtype.
            IntegrityError: It holds values that this model cannot have made.
        """
        return self.crossing.accept(context)

    async def ajoin(
        self,
        contexts: Seq[Context],
        *,
        strategy: JoinStrategy = "replay",
        timeout: float | None = None,
        source: str = "",
    ) -> Context:
        """Asynchronous `join`; cancelling the task frees the sequence."""
        await asyncio.to_thread(self.load)
        with start_operation("join", self.model_path, {"strategy": strategy}) as operation:
            work = await asyncio.to_thread(self._joining, contexts, strategy, timeout, source)
            return await await_result(work, operation)

    @override
    def load(self) -> None:
        self._requests  # noqa: B018  (the first look loads the model)

    @property
    def _requests(self) -> RequestBuilder:
        if self._builder is None:
            self._builder = RequestBuilder(self._runtime, self.store, self._owner)
        return self._builder

    @override
    def _renderer(self) -> PromptRenderer:
        return self._runtime.renderer

    @override
    def _thinking(self, prompt: Prompt, steps: int, context: Context | None, options: ThinkOptions) -> Work[Context]:
        return self._requests.thought(prompt, steps, context, options)

    @override
    def _answering(self, prompt: Prompt, context: Context | None, options: GenerateOptions) -> Work[Chunk]:
        return self._requests.answer(prompt, context, options)

    @override
    def _replaying(self, context: Context) -> Work[Context]:
        return self._requests.replay(context)

    def _joining(
        self, contexts: Seq[Context], strategy: JoinStrategy, timeout: float | None, source: str
    ) -> Work[Context]:
        return self._requests.join(contexts, strategy, timeout, source)

    @override
    def _check_receivable(self, context: Context) -> None:
        self._requests.check_receivable(context)
