"""From a caller's prompt and options to a sequence that the scheduler can run: rendering, checks, limits."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

from avp_agents.context import Context, HostKv, LatentRecipe
from avp_agents.engine.base import GenerateOptions, Prompt, ThinkOptions
from avp_agents.engine.model_runtime import ModelRuntime
from avp_agents.engine.prompt import PromptPlan
from avp_agents.engine.sampling import RowSampler, SamplingParams
from avp_agents.engine.sequence import Answering, Event, Replaying, Request, Thinking
from avp_agents.engine.stopping import TextStream
from avp_agents.errors import ConfigurationError, ContextWindowError, FingerprintMismatchError, StoreError
from avp_agents.store import ContextStore

DEGENERATE_STEPS = 40
_THINK_OPTIONS = tuple(ThinkOptions.__annotations__)
_NOT_LATENT = ("timeout", "source")

Deliver = Callable[[Event], None]


class RequestBuilder:
    """Makes sequences for one model. Everything that can be checked before work starts is checked here.

    Args:
        runtime: The model.
        store: Where evicted KV-caches may be.
        model_path: The model's name, for messages.
    """

    def __init__(self, runtime: ModelRuntime, store: ContextStore, model_path: str) -> None:
        self._runtime, self._store, self._model_path = runtime, store, model_path

    def thinking(
        self,
        prompt: Prompt,
        steps: int,
        context: Context | None,
        options: ThinkOptions,
        deliver: Deliver,
    ) -> Thinking:
        """A think request. See `LatentEngine.think`."""
        if unknown := sorted(set(options) - set(_THINK_OPTIONS)):
            raise ConfigurationError(f"Unknown option {unknown[0]!r}; known options: {', '.join(_THINK_OPTIONS)}.")
        runtime = self._runtime
        latent: dict[str, Any] = {name: value for name, value in options.items() if name not in _NOT_LATENT}
        recipe = runtime.latent_step.recipe(steps, **latent)
        runtime.latent_step.prepare(recipe)
        if steps > DEGENERATE_STEPS:
            warnings.warn(f"{steps} latent steps: quality falls from {DEGENERATE_STEPS} on.", stacklevel=4)
        plan = self._plan(prompt, context)
        self._check_window(plan, recipe.steps)
        request = self._request(plan, options.get("timeout"), options.get("source"), deliver)
        return Thinking(request, recipe, _looks_at_logits(runtime, recipe))

    def answering(
        self, prompt: Prompt, context: Context | None, options: GenerateOptions, deliver: Deliver
    ) -> Answering:
        """A generate request. See `LatentEngine.generate`."""
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
        text = TextStream(runtime.tokenizer, params.stop, min_tokens=params.min_tokens)
        return Answering(request, max_tokens, sampler, text, frozenset(params.stop_token_ids))

    def replaying(self, context: Context, deliver: Deliver) -> Replaying:
        """A replay request. See `LatentEngine.replay`."""
        self.check_model(context)
        plan = PromptPlan(base=context, token_ids=(), relation="continuation")
        return Replaying(self._request(plan, None, None, deliver))

    def _plan(self, prompt: Prompt, context: Context | None) -> PromptPlan:
        plan = self._runtime.renderer.plan(prompt, context)
        for used in (plan.base, plan.reuse):
            if used is not None:
                self.check_model(used)
        return plan

    def _request(self, plan: PromptPlan, timeout: float | None, source: str | None, deliver: Deliver) -> Request:
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
                kv = self._store.get(handle).kv
            except StoreError:
                return None
        return kv if isinstance(kv, HostKv) else None

    def check_model(self, context: Context) -> None:
        """Refuse a context of another model or dtype.

        Raises:
            FingerprintMismatchError: It is one.
        """
        loaded = self._runtime.loaded
        if context.fingerprint != loaded.fingerprint:
            raise FingerprintMismatchError(
                f"The context was made by model {context.fingerprint[:16]}, this engine runs {loaded.fingerprint[:16]} "
                f"({self._model_path}). Use the engine that made it, or hand its text over."
            )
        if context.dtype != loaded.dtype_name:
            raise FingerprintMismatchError(
                f"The context was made in {context.dtype}, this engine runs {loaded.dtype_name}; give both one dtype."
            )

    def _check_window(self, plan: PromptPlan, requested: int) -> None:
        window = self._runtime.window
        if len(plan) + requested > window:
            context = len(plan.base) if plan.base is not None else 0
            raise ContextWindowError(window=window, context=context, prompt=len(plan.token_ids), requested=requested)


def _looks_at_logits(runtime: ModelRuntime, recipe: LatentRecipe) -> bool:
    """Whether every step needs logits: for f, for a stopping rule, or for the readout of a run that may end early."""
    return runtime.latent_step.needs_logits(recipe) or recipe.stop_cosine is not None
