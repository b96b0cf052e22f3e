"""VllmEngine: the engine's public face on vLLM, in this process or on a server."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, Self

from typing_extensions import override

from avp_agents.answer.generation import Chunk
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.context import Context
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.engine.verbs import EngineVerbs, Work, wait
from avp_agents.errors import EngineClosedError, RequestTimeoutError
from avp_agents.models import resolve_model
from avp_agents.prompt.chat_messages import Prompt
from avp_agents.prompt.plan import PromptRenderer
from avp_agents.store import ContextStore, default_store, open_store
from avp_agents.tracing import start_operation
from avp_agents.vllm.answer import T, VllmRequest
from avp_agents.vllm.backend import Backend
from avp_agents.vllm.in_process import InProcess
from avp_agents.vllm.requests import VllmRequestBuilder
from avp_agents.vllm.served_model import ModelSettings, ServedModel
from avp_agents.vllm.server import Address, Server
from avp_agents.vllm.worker import Sent, Worker

_HUB = {"revision": "revision", "hf_token": "token"}
"""vLLM's names of options that say where files come from, and the hub's."""
_LOOK_AGAIN_SECONDS = 0.05


class VllmEngine(EngineVerbs):
    """Implements `avp_agents.engine.protocol.Engine` with vLLM. Thread-safe; works on any event loop.

    Contexts are those of a `LatentEngine` with the same weights and dtype: either engine goes on with what the other
    one made. They reach vLLM as lineage, token ids and latent embeddings, and are prefilled there as far as vLLM's own
    prefix cache does not hold them; so any replica can take any request.

    vLLM admits requests in the order in which they come: ``source`` has no say. It draws random numbers of its own: a
    seed gives the same answer again, but not the one that a `LatentEngine` gives. Giving up a call aborts it in vLLM.
    With a `kv_store`, vLLM itself loads the keys and values of contexts that came from the store with theirs, and
    `save_kv` has it store those of its own. Same weights and dtype only; what cannot be loaded is prefilled.

    Beside the errors of every engine there are `TransportError`, and `UnsupportedModelError` where vLLM runs without
    the plugin for latent steps (`think`), or a context holds positions that vLLM cannot compute (it was spliced).

    Example:
        >>> with VllmEngine.from_pretrained("Qwen/Qwen3-8B", latent_steps=True) as engine:
        ...     context = engine.think("Analyze: 24 * 17 + 3", steps=20)
        ...     print(engine.generate("Solve step by step: 24 * 17 + 3", context=context).text)
    """

    def __init__(self, model: ServedModel, backend: Backend, store: ContextStore, *, loads_kv: bool = False) -> None:
        self.model_path = model.settings.name
        self.store = store
        self._model = model
        self._runtime = _Runtime(model, backend, loads_kv=loads_kv)
        self._finalizer = weakref.finalize(self, self._runtime.close)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | None = None,
        *,
        dtype: str | None = None,
        latent_steps: bool = False,
        store: ContextStore | None = None,
        kv_store: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """An engine with a vLLM of its own; the weights are loaded at the first use.

        vLLM starts further processes, so a script needs ``if __name__ == "__main__":`` around its work.

        Args:
            name_or_path: Hub name or folder; None is the embedded default model.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; by default what vLLM makes of the checkpoint.
            latent_steps: Load the plugin for latent steps inside vLLM, which `think` needs.
            store: Where handles are resolved; by default memory over disk in the user's cache folder.
            kv_store: The URL of a store (`open_store`) that vLLM itself loads keys and values from, and saves them to.
                It is `store`, too, where none is given; else the two have to be over the same.
            chat_template_kwargs: Options of the chat template, such as ``{"enable_thinking": False}``.
            **options: vLLM's engine arguments: ``tensor_parallel_size``, ``gpu_memory_utilization``, ``max_model_len``,
                ``revision``, ...

        Raises:
            ModelNotFoundError: No name was given, and no source has the default model.
            ConfigurationError: An option is one that the engine sets itself.
            UnsupportedModelError: `latent_steps`, and the plugin does not have this architecture.
        """
        store, kv = _stores(store, kv_store)
        path = resolve_model(name_or_path)
        hub = {name: options[option] for option, name in _HUB.items() if option in options}
        model = ServedModel(ModelSettings(path, hub, None, dict(chat_template_kwargs or {})))
        backend = InProcess(model, dtype=dtype, latent_steps=latent_steps, kv_store=kv, options=options)
        return cls(model, backend, store, loads_kv=kv is not None)

    @classmethod
    def from_server(
        cls,
        url: str,
        name_or_path: str | None = None,
        *,
        served_name: str | None = None,
        api_key: str | None = None,
        dtype: str | None = None,
        fingerprint: str | None = None,
        store: ContextStore | None = None,
        kv_store: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        seconds: float = 600.0,
        **hub: Any,
    ) -> Self:
        """An engine on a vLLM server that runs somewhere, which is asked at the first use.

        The server needs ``--enable-prompt-embeds --trust-request-chat-template``; ``--enable-prompt-tokens-details`` to
        tell what its prefix cache held; ``--structured-outputs-config.backend guidance`` for tools, structured output
        and grammars; and for `think` and `kv_store` the arguments of ``plugin_arguments``. See docs/vllm.md.

        Args:
            url: ``http://host:port``.
            name_or_path: The checkpoint that the server runs, for its tokenizer and fingerprint: hub name or folder; by
                default the name by which the server knows it, which is asked for now.
            served_name: What the server calls it, where it serves several.
            api_key: The server's ``--api-key``.
            dtype: What the server holds the model in; by default the checkpoint's.
            fingerprint: Which model it is, as an engine with its weights reports it. Without one it is computed from
                the weights, which then have to be at hand here.
            store: As in `from_pretrained`.
            kv_store: The URL of the store that the server was started with (``plugin_arguments(kv_store=...)``).
            chat_template_kwargs: As in `from_pretrained`.
            seconds: How long an answer, or the next piece of one, may take.
            **hub: ``revision``, ``token``, ``local_files_only``, ``cache_dir``: where the checkpoint's files come from.

        Raises:
            TransportError: That is not a URL, or the server was to be asked and cannot be reached.
            ConfigurationError: An option is unknown.
        """
        store, kv = _stores(store, kv_store)
        address = Address(url, api_key=api_key, seconds=seconds)
        name = name_or_path or str(address.served(served_name)["root"])
        model = ServedModel(ModelSettings(name, hub, fingerprint, dict(chat_template_kwargs or {})))
        backend = Server(address, model, served_name=served_name, dtype=dtype)
        return cls(model, backend, store, loads_kv=kv is not None)

    @property
    def fingerprint(self) -> str:
        """Digest of weights, architecture and tokenizer; reads samples of the weights, and loads nothing."""
        return self._model.fingerprint

    @property
    def dtype(self) -> str:
        """``"float32"``, ``"bfloat16"`` or ``"float16"``; loads the model."""
        return self._runtime.worker.facts.dtype

    @property
    def context_window(self) -> int:
        """Positions that a request may have; loads the model."""
        return self._runtime.worker.facts.window

    def join(
        self,
        contexts: Seq[Context],
        *,
        strategy: JoinStrategy = "replay",
        timeout: float | None = None,
        source: str = "",
    ) -> Context:
        """Several contexts as one, for the next agent to go on with; vLLM computes it with the next request.

        Args:
            contexts: Of this model, in the order in which the next agent reads them.
            strategy: ``"replay"`` or ``"text"``; see `avp_agents.engine.join`.
            timeout, source: Of no meaning here: nothing is computed.

        Raises:
            UnsupportedModelError: The strategy is ``"splice"``.
            ConfigurationError, PromptError, ContextWindowError, FingerprintMismatchError
        """
        with start_operation("join", self.model_path, {"strategy": strategy}):
            return self._runtime.requests.joined(contexts, strategy)

    async def ajoin(
        self,
        contexts: Seq[Context],
        *,
        strategy: JoinStrategy = "replay",
        timeout: float | None = None,
        source: str = "",
    ) -> Context:
        """Asynchronous `join`."""
        return await asyncio.to_thread(self.join, contexts, strategy=strategy, timeout=timeout, source=source)

    def save_kv(self, context: Context, *, timeout: float = 60.0) -> Context:
        """Have vLLM write a stored context's keys and values into the store, so that others need not prefill it.

        vLLM prefills what its prefix cache does not hold of it.

        Args:
            context: One that was put into `store`.
            timeout: Seconds until it has to be there.

        Returns:
            The context as the store has it now, with its keys and values.

        Raises:
            NotStoredError: The context was never stored.
            ConfigurationError: The engine has no `kv_store`, or the context is in another dtype than vLLM.
            RequestTimeoutError: The store did not get them; vLLM's log says why.
            ContextLostError: The context has left the store.
        """
        latest = time.monotonic() + timeout
        # where the store had the context already, its latent values may be another run's
        stored = self.store.get(context.to_handle())
        if stored.has_whole_kv:
            return stored
        self.load()
        with start_operation("save", self.model_path) as operation:
            wait(self._sent(self._runtime.requests.saving(stored, timeout)), operation)
        while not (stored := self.store.get(stored.to_handle())).has_whole_kv:
            if time.monotonic() > latest:
                raise RequestTimeoutError(f"The store got no keys and values within {timeout:g} s; see vLLM's log.")
            time.sleep(_LOOK_AGAIN_SECONDS)
        return stored

    async def asave_kv(self, context: Context, *, timeout: float = 60.0) -> Context:
        """Asynchronous `save_kv`."""
        return await asyncio.to_thread(self.save_kv, context, timeout=timeout)

    @override
    def load(self) -> None:
        self._runtime.worker  # noqa: B018  (the first look starts it)

    @override
    def _renderer(self) -> PromptRenderer:
        return self._model.renderer

    @override
    def _thinking(self, prompt: Prompt, steps: int, context: Context | None, options: ThinkOptions) -> Work[Context]:
        return self._sent(self._runtime.requests.thinking(prompt, steps, context, options))

    @override
    def _answering(self, prompt: Prompt, context: Context | None, options: GenerateOptions) -> Work[Chunk]:
        return self._sent(self._runtime.requests.answering(prompt, context, options))

    @override
    def _replaying(self, context: Context) -> Work[Context]:
        return self._sent(self._runtime.requests.replaying(context))

    @override
    def _check_receivable(self, context: Context) -> None:
        self._runtime.requests.check_receivable(context)

    def _sent(self, request: VllmRequest[T]) -> Work[T]:
        return Sent(self._runtime.worker, request)


class _Runtime:
    """vLLM, started at the first use. Thread-safe."""

    def __init__(self, model: ServedModel, backend: Backend, *, loads_kv: bool) -> None:
        self._model, self._backend, self._loads_kv = model, backend, loads_kv
        self._lock = threading.Lock()
        self._running: tuple[Worker, VllmRequestBuilder] | None = None
        self._closed = False

    @property
    def worker(self) -> Worker:
        """Who speaks with vLLM."""
        return self._started()[0]

    @property
    def requests(self) -> VllmRequestBuilder:
        """Who makes requests for it."""
        return self._started()[1]

    def close(self) -> None:
        """Stop vLLM."""
        with self._lock:
            self._closed = True
            if self._running is not None:
                self._running[0].close()

    def _started(self) -> tuple[Worker, VllmRequestBuilder]:
        with self._lock:
            if self._closed:
                raise EngineClosedError("The engine was closed.")
            if self._running is None:
                worker = Worker(self._backend)
                self._running = worker, VllmRequestBuilder(self._model, worker.facts, loads_kv=self._loads_kv)
            return self._running


def _stores(store: ContextStore | None, kv_store: str | None) -> tuple[ContextStore, tuple[str, str] | None]:
    """The engine's store; URL and namespace of what vLLM opens by itself."""
    if kv_store is None:
        return store if store is not None else default_store(), None
    store = store if store is not None else open_store(kv_store, share_kv=True)
    return store, (kv_store, store.namespace.name)
