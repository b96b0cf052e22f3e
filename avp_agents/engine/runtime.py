"""Everything that runs one model: tokenizer, weights, KV pool, scheduler, each made when it is first needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from platformdirs import user_cache_path

from avp_agents.answer.grammar import GrammarCompiler
from avp_agents.crossing.sides import Crossing, Reread, Side
from avp_agents.engine.core.forward import ModelRunner
from avp_agents.engine.core.kv_pool import KvPool, PooledKv
from avp_agents.engine.core.latent_step import LatentStep
from avp_agents.engine.core.model import LoadedModel
from avp_agents.engine.core.scheduler import Model, Scheduler
from avp_agents.engine.extras.graph import CapturedRunner
from avp_agents.engine.extras.invariant import INVARIANT_CHUNK, ChunkNotes, InvariantRunner, same_shapes
from avp_agents.engine.extras.splice import Splices
from avp_agents.engine.loading.load import TokenizerFiles
from avp_agents.engine.loading.self_check import verify_exactness
from avp_agents.engine.loading.source import ModelSource
from avp_agents.errors import ConfigurationError, EngineClosedError, StoreError
from avp_agents.prompt.plan import PromptRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from avp_agents.context import Context, LatentRecipe
    from avp_agents.store import ContextStore

log = logging.getLogger(__name__)

CPU_POOL_BYTES = 2 * 2**30
ACCELERATOR_POOL_SHARE = 0.6


class ModelRuntime:
    """One model and what runs it. Thread-safe.

    Args:
        source: Where tokenizer and weights come from.
        **options: See `LatentEngine.from_pretrained`.

    Attributes:
        name: What the model is called, for people.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        batch_invariant: bool = False,
        kv_pool_bytes: int | None = None,
        max_batch: int = 16,
        max_queue: int = 256,
        capture_steps: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reread: Reread = True,
        project_vectors: bool = False,
    ) -> None:
        if max_batch < 1 or max_queue < 1:
            raise ConfigurationError("max_batch and max_queue must be at least 1.")
        if reread not in (True, False, "all"):
            raise ConfigurationError(f"reread must be True, False or 'all', not {reread!r}.")
        self.name = source.name
        self._source = source
        self._batch_invariant, self._capture_steps = batch_invariant, capture_steps
        self._kv_pool_bytes, self._max_batch, self._max_queue = kv_pool_bytes, max_batch, max_queue
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        self.reread: Reread = reread
        self._project_vectors = project_vectors
        self._lock = threading.RLock()
        self._scheduler: Scheduler | None = None
        self._closed = False
        self._offloads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="avp-offload")

    @cached_property
    def _tokenizer_files(self) -> TokenizerFiles:
        with self._lock:
            return self._source.tokenizer_files()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; needs no weights."""
        return self._tokenizer_files.tokenizer

    def token_text(self, token_id: int) -> str:
        """A token's text, for log-probabilities."""
        return str(self.tokenizer.decode([token_id]))

    @cached_property
    def window(self) -> int:
        """Positions the model supports; needs no weights."""
        return self._tokenizer_files.window

    @cached_property
    def renderer(self) -> PromptRenderer:
        """Prompts to ids."""
        with self._lock:
            files = self._tokenizer_files
            options = self._chat_template_kwargs
            return PromptRenderer(files.tokenizer, chat_template_kwargs=options, eos_token_ids=files.eos_ids)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """What answers may be, for this tokenizer."""
        with self._lock:
            renderer = self.renderer
            backend = cast("Any", self.tokenizer).backend_tokenizer
            return GrammarCompiler(backend, end_ids=renderer.stop_ids, control_ids=renderer.control_ids)

    @property
    def loaded(self) -> LoadedModel:
        """The model with its weights."""
        return self.scheduler.runner.loaded

    @property
    def loaded_fingerprint(self) -> str | None:
        """The model's fingerprint; None where its weights are not loaded, or not any more."""
        scheduler = self._scheduler
        return None if self._closed or scheduler is None else scheduler.runner.loaded.fingerprint

    @cached_property
    def crossing(self) -> Crossing:
        """The way out of this model and into it, for contexts of others."""
        return Crossing(self.name, self._side, project_vectors=self._project_vectors)

    def _side(self) -> Side:
        loaded, latent_step = self.loaded, self.latent_step
        return Side(
            fingerprint=loaded.fingerprint,
            dtype=loaded.dtype_name,
            tokenizer=self.tokenizer,
            renderer=self.renderer,
            vocabulary_size=loaded.vocabulary.size,
            embed=loaded.vocabulary.embed,
            mean_norm=lambda: latent_step.mean_norm,
            device=loaded.vocabulary.device,
            hidden=loaded.vocabulary.rows(0, 1).shape[-1],
            check_kv=self.scheduler.pool.check,
        )

    @property
    def latent_step(self) -> LatentStep:
        """f(h)."""
        return self.scheduler.runner.latent_step

    @property
    def scheduler(self) -> Scheduler:
        """The running scheduler; loads the model at the first use.

        Raises:
            EngineClosedError: The engine was closed.
        """
        if self._closed:
            raise EngineClosedError("The engine was closed.")
        if self._scheduler is None:
            with self._lock:
                if self._scheduler is None:
                    self._scheduler = self._start()
        return self._scheduler

    def close(self) -> None:
        """Stop the thread and free the pool."""
        with self._lock:
            self._closed = True
            if self._scheduler is not None:
                self._scheduler.close()
                self._offloads.shutdown(wait=True)
                self._scheduler.pool.clear()

    def prepare(self, recipe: LatentRecipe) -> None:
        """Compute what a latent method needs once, on a thread that ends with it, as `Scheduler` explains.

        Raises:
            UnsupportedModelError: The method needs a head that this model does not have.
        """
        latent_step = self.latent_step
        if not latent_step.is_prepared(recipe):
            with ThreadPoolExecutor(1) as once:
                once.submit(latent_step.prepare, recipe).result()

    def offload_to(self, store: ContextStore) -> Callable[[PooledKv], None]:
        """What hands an evicted KV-cache to `store`, if its context was stored; else the lineage alone stays."""

        def offload(view: PooledKv) -> None:
            context = view.context()
            if context is not None and context.handle is not None:
                self._offloads.submit(_add_kv, store, context.with_kv(view.to_host()))

        return offload

    def _start(self) -> Scheduler:
        # the tokenizer is fetched here: the lock held now is not the model thread's
        load = partial(self._load, self.tokenizer)
        return Scheduler(load, max_batch=self._max_batch, max_queue=self._max_queue)

    def _load(self, tokenizer: PreTrainedTokenizerBase) -> Model:
        # torch.compile cannot look into packed weights; it lays them out itself
        loaded = self._source.load(tokenizer, pack=not self._capture_steps)
        latent_step = LatentStep(loaded.vocabulary, _ridge_file(loaded))
        pool = KvPool(loaded.shapes, self._pool_positions(loaded))
        verify_exactness(loaded, pool)
        splices = Splices(loaded, pool, copies=not self._batch_invariant)
        captures = self._captures(loaded)
        if self._batch_invariant:
            runner = InvariantRunner(loaded, pool, latent_step, rows=self._max_batch)
            return Model(runner, splices, (ChunkNotes(),), same_shapes, INVARIANT_CHUNK)
        runner = CapturedRunner(loaded, pool, latent_step) if captures else ModelRunner(loaded, pool, latent_step)
        return Model(runner, splices)

    def _captures(self, loaded: LoadedModel) -> bool:
        """Whether steps run as captured graphs."""
        single = len({shape.device for shape in loaded.shapes} | {loaded.device}) == 1
        if self._capture_steps is None:
            return loaded.device.type == "cuda" and single and not self._batch_invariant
        if not self._capture_steps:
            return False
        if not single:
            raise ConfigurationError("capture_steps needs the whole model on one device; drop it or the device_map.")
        if self._batch_invariant:
            raise ConfigurationError("capture_steps and batch_invariant exclude each other; choose one.")
        return True

    def _pool_positions(self, loaded: LoadedModel) -> int:
        per_position = sum(shape.bytes_per_position for shape in loaded.shapes)
        budget = self._kv_pool_bytes
        if budget is None:
            free = torch.cuda.mem_get_info(loaded.device)[0] if loaded.device.type == "cuda" else None
            budget = CPU_POOL_BYTES if free is None else int(ACCELERATOR_POOL_SHARE * free)
        if budget < per_position:
            raise ConfigurationError(f"kv_pool_bytes={budget} holds no position: one takes {per_position} bytes.")
        return budget // per_position


def _add_kv(store: ContextStore, context: Context) -> None:
    try:
        store.add_kv(context)
    except StoreError as error:
        log.warning("An evicted KV-cache was not kept (its lineage is): %s", error)


def _ridge_file(loaded: LoadedModel) -> Path:
    return user_cache_path("avp-agents") / "ridge" / f"{loaded.fingerprint}.safetensors"
