"""Everything that runs one model: tokenizer, weights, KV pool, scheduler, each made when it is first needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from platformdirs import user_cache_path

from avp_agents.answer.grammar import GrammarCompiler
from avp_agents.engine.core.forward import Runner
from avp_agents.engine.core.kv_pool import KvPool, PooledKv
from avp_agents.engine.core.latent_step import LatentStep
from avp_agents.engine.core.model import LoadedModel
from avp_agents.engine.core.scheduler import Machinery, Scheduler
from avp_agents.engine.crossing import Crossing, Reread
from avp_agents.engine.extras.graph import CapturedStep
from avp_agents.engine.extras.splice import KeyRotation
from avp_agents.engine.loading.load import TokenizerFiles
from avp_agents.engine.loading.self_check import verify_exactness
from avp_agents.engine.loading.source import ModelSource
from avp_agents.errors import ConfigurationError, EngineClosedError, StoreError
from avp_agents.prompt.plan import PromptRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from avp_agents.context import LatentRecipe

log = logging.getLogger(__name__)

CPU_POOL_BYTES = 2 * 2**30
ACCELERATOR_POOL_SHARE = 0.6
PREFILL_BUDGET = 512


@dataclass(frozen=True)
class EngineSettings:
    """Options of `LatentEngine.from_pretrained`."""

    batch_invariant: bool = False
    kv_pool_bytes: int | None = None
    max_batch: int = 16
    max_queue: int = 256
    capture_steps: bool | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reread: Reread = True
    project_vectors: bool = False

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.max_queue < 1:
            raise ConfigurationError("max_batch and max_queue must be at least 1.")
        if self.reread not in (True, False, "all"):
            raise ConfigurationError(f"reread must be True, False or 'all', not {self.reread!r}.")


class ModelRuntime:
    """One model and what runs it. Thread-safe.

    Args:
        source: Where tokenizer and weights come from.
        settings: See `LatentEngine.from_pretrained`.
    """

    def __init__(self, source: ModelSource, settings: EngineSettings) -> None:
        self._source, self._settings = source, settings
        self._lock = threading.RLock()
        self._scheduler: Scheduler | None = None
        self._closed = False
        self._offloads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="avp-offload")

    @cached_property
    def _tokenizer_files(self) -> TokenizerFiles:
        with self._lock:
            return self._source.tokenizer_files()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; needs no weights."""
        return self._tokenizer_files.tokenizer

    @property
    def window(self) -> int:
        """Positions the model supports; needs no weights."""
        return self._tokenizer_files.window

    @cached_property
    def renderer(self) -> PromptRenderer:
        """Prompts to ids."""
        with self._lock:
            files = self._tokenizer_files
            options = self._settings.chat_template_kwargs
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
        return self.scheduler.machinery.loaded

    @property
    def settings(self) -> EngineSettings:
        """The engine's options."""
        return self._settings

    @property
    def loaded_fingerprint(self) -> str | None:
        """The model's fingerprint; None where its weights are not loaded, or not any more."""
        scheduler = self._scheduler
        return None if self._closed or scheduler is None else scheduler.machinery.loaded.fingerprint

    @cached_property
    def crossing(self) -> Crossing:
        """The way out of this model and into it, for contexts of others."""
        return Crossing(self, self._source.name)

    @property
    def latent_step(self) -> LatentStep:
        """f(h)."""
        return self.scheduler.machinery.latent_step

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

    def _start(self) -> Scheduler:
        settings = self._settings
        return Scheduler(
            # the tokenizer is fetched here: the lock held now is not the model thread's
            partial(self._load, self.tokenizer),
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            prefill_budget=PREFILL_BUDGET,
            batch_invariant=settings.batch_invariant,
        )

    def _load(self, tokenizer: PreTrainedTokenizerBase) -> Machinery:
        # torch.compile cannot look into packed weights; it lays them out itself
        loaded = self._source.load(tokenizer, pack=not self._settings.capture_steps)
        latent_step = LatentStep(loaded.vocabulary, _ridge_file(loaded))
        pool = KvPool(loaded.shapes, self._pool_positions(loaded), self._offload)
        verify_exactness(loaded, pool)
        captured = self._captured(loaded, pool)
        rows = self._settings.max_batch if self._settings.batch_invariant else None
        runner = Runner(loaded, pool, invariant_rows=rows, captured=captured)
        return Machinery(loaded, pool, runner, latent_step, KeyRotation(loaded, pool))

    def _captured(self, loaded: LoadedModel, pool: KvPool) -> CapturedStep | None:
        single = len({shape.device for shape in loaded.shapes} | {loaded.device}) == 1
        wanted = self._settings.capture_steps
        if wanted is None:
            wanted = loaded.device.type == "cuda" and single and not self._settings.batch_invariant
        if not wanted:
            return None
        if not single:
            raise ConfigurationError("capture_steps needs the whole model on one device; drop it or the device_map.")
        if self._settings.batch_invariant:
            raise ConfigurationError("capture_steps and batch_invariant exclude each other; choose one.")
        return CapturedStep(loaded, pool)

    def _pool_positions(self, loaded: LoadedModel) -> int:
        per_position = sum(shape.bytes_per_position for shape in loaded.shapes)
        budget = self._settings.kv_pool_bytes
        if budget is None:
            free = torch.cuda.mem_get_info(loaded.device)[0] if loaded.device.type == "cuda" else None
            budget = CPU_POOL_BYTES if free is None else int(ACCELERATOR_POOL_SHARE * free)
        if budget < per_position:
            raise ConfigurationError(f"kv_pool_bytes={budget} holds no position: one takes {per_position} bytes.")
        return budget // per_position

    def _offload(self, view: PooledKv) -> None:
        """Hand an evicted KV-cache to the store, if its context was stored; else the lineage alone stays."""
        context = view.context()
        if context is None or context.handle is None:
            return
        copy = context.with_kv(view.to_host())

        def put() -> None:
            try:
                view.store.add_kv(copy)
            except StoreError as error:
                log.warning("An evicted KV-cache was not kept (its lineage is): %s", error)

        self._offloads.submit(put)


def _ridge_file(loaded: LoadedModel) -> Path:
    return user_cache_path("avp-agents") / "ridge" / f"{loaded.fingerprint}.safetensors"
