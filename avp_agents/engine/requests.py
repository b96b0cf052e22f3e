"""From a caller's prompt and options to a sequence that the scheduler can run: rendering, checks, limits."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Sequence as Seq
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

from avp_agents.answer.builder import CLOSING, AnswerBuilder
from avp_agents.answer.detokenizer import TextStream
from avp_agents.answer.generation import Chunk
from avp_agents.answer.grammar import Constraint, Grammar
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.context import Context, SplicedSegment
from avp_agents.engine.constrained import ConstrainedSampler
from avp_agents.engine.core.kv_pool import Owner
from avp_agents.engine.core.sampling import DEFAULT_MAX_TOKENS, RowSampler, SamplingParams
from avp_agents.engine.core.sequence import Request
from avp_agents.engine.crossing import LocalCrossing
from avp_agents.engine.join import Joiner, JoinReport
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.engine.runtime import ModelRuntime
from avp_agents.engine.sequences import AnswerSequence, Delivering, ReplaySequence, Report, Scheduled, ThoughtSequence
from avp_agents.engine.verbs import T, Work
from avp_agents.errors import ConfigurationError, ContextWindowError, StoreError
from avp_agents.kv_cache import HostKv
from avp_agents.prompt.chat_messages import Prompt
from avp_agents.prompt.plan import PromptPlan
from avp_agents.store import ContextStore
from avp_agents.usage import Handoff

DEGENERATE_STEPS = 40
MAX_LOGPROBS = 50
MAX_STOP_STRINGS = 16
_THINK_OPTIONS = tuple(ThinkOptions.__annotations__)
_NOT_LATENT = ("chat_template_kwargs", "tools", "timeout", "source")


class RequestBuilder:
    """Makes sequences for one model. Everything that can be checked before work starts is checked here.

    Args:
        runtime: The model; it is loaded now.
        store: Where evicted KV-caches may be.
        owner: The store as the pool knows it.
    """

    def __init__(self, runtime: ModelRuntime, store: ContextStore, owner: Owner) -> None:
        self._runtime, self._store, self._owner = runtime, store, owner
        self._scheduler, self._loaded, self._latent_step = runtime.scheduler, runtime.loaded, runtime.latent_step
        self._model = self._scheduler.model
        self._crossing = LocalCrossing(runtime.crossing, store, runtime.reread)

    def thought(self, prompt: Prompt, steps: int, context: Context | None, options: ThinkOptions) -> Work[Context]:
        """For `LatentEngine.think`."""
        if unknown := sorted(set(options) - set(_THINK_OPTIONS)):
            raise ConfigurationError(f"Unknown option {unknown[0]!r}; known options: {', '.join(_THINK_OPTIONS)}.")
        latent: dict[str, Any] = {name: value for name, value in options.items() if name not in _NOT_LATENT}
        recipe = self._latent_step.recipe(steps, **latent)
        self._runtime.prepare(recipe)
        if steps > DEGENERATE_STEPS:
            warnings.warn(f"{steps} latent steps: quality falls from {DEGENERATE_STEPS} on.", stacklevel=4)
        plan, crossed = self._plan(prompt, context, options)
        plan.check_window(self._runtime.window, recipe.steps)
        request, report = self._prompt_request(plan, options), self._report(plan.relation, plan.notes, crossed)
        # f, a stopping rule, or the readout of a run that may end early
        looks_at_logits = self._latent_step.needs_logits(recipe) or recipe.stop_cosine is not None
        return self._work(ThoughtSequence(request, recipe, report, looks_at_logits=looks_at_logits))

    def answer(self, prompt: Prompt, context: Context | None, options: GenerateOptions) -> Work[Chunk]:
        """For `LatentEngine.generate` and `stream`."""
        runtime = self._runtime
        size, stop_ids = self._loaded.vocabulary.size, runtime.renderer.stop_ids
        params = sampling_params(options, vocab_limit=size, eos_token_ids=stop_ids)
        plan, crossed = self._plan(prompt, context, options)
        max_tokens = params.token_budget(runtime.window - len(plan))
        plan.check_window(self._runtime.window, max(1, max_tokens))
        request, report = self._prompt_request(plan, options), self._report(plan.relation, plan.notes, crossed)
        base_ids = plan.base.token_ids() if plan.base is not None else ()
        constraint = self._constraint(options.get("grammar"), plan, max_tokens)
        ids = (*base_ids, *plan.token_ids)
        sampler = RowSampler(params, ids) if constraint is None else ConstrainedSampler(params, ids, constraint)
        skips = options.get("skip_special_tokens", True)
        text = TextStream(runtime.tokenizer, params.stop, min_tokens=params.min_tokens, skip_special_tokens=skips)
        split = plan.reasoning_split(marked=runtime.renderer.marks_reasoning)
        ends, asked = frozenset(params.stop_token_ids), params.logprobs is not None
        builder = AnswerBuilder(max_tokens, ends, text, split, runtime.token_text, logprobs=asked)
        return self._work(AnswerSequence(request, max_tokens, sampler, builder, report))

    def replay(self, context: Context) -> Work[Context]:
        """For `LatentEngine.replay`."""
        self._runtime.crossing.check_model(context)
        return self._work(ReplaySequence(self._request(context), self._report("replay")))

    def _constraint(self, grammar: Grammar | None, plan: PromptPlan, max_tokens: int) -> Constraint | None:
        """What the answer may be; reasoning that the prompt has opened stands before it."""
        if grammar is None:
            return None
        after = CLOSING if plan.opens_reasoning else None
        return self._runtime.grammars.constraint(grammar, max_tokens, after=after)

    def join(self, contexts: Seq[Context], strategy: JoinStrategy, timeout: float | None, source: str) -> Work[Context]:
        """For `LatentEngine.join`: what a joined context does not find in the pool is prefilled."""
        received = [self._crossing.context(context) for context in contexts]
        contexts = [context for context, _ in received]
        notes = tuple(f"{handoff.mode}: {handoff.reason}" for _, handoff in received if handoff is not None)
        joined = Joiner(self._runtime.renderer.whole_turns).join(contexts, strategy)
        joined = replace(joined, notes=notes + joined.notes)
        loaded, window = self._loaded, self._runtime.window
        context = Context(loaded.fingerprint, loaded.dtype_name, joined.lineage)
        if len(context) >= window:
            raise ContextWindowError(window=window, context=len(context), prompt=0, requested=1)
        request = self._request(context)
        _limit(request, timeout, source)
        return self._work(ReplaySequence(request, JoinReport(loaded.fingerprint, loaded.dtype_name, joined)))

    def _work(self, sequence: Delivering[T]) -> Work[T]:
        return Scheduled(self._scheduler, sequence)

    def _plan(
        self, prompt: Prompt, context: Context | None, options: ThinkOptions | GenerateOptions
    ) -> tuple[PromptPlan, Handoff | None]:
        """What to prefill, and how contexts of other models were received for it."""
        crossed = None
        if context is not None or _carries_contexts(prompt):
            received = self._crossing.prompt(prompt, context)
            prompt, context, crossed = received.prompt, received.context, received.handoff
        template_options = options.get("chat_template_kwargs")
        tools = options.get("tools") or ()
        plan = self._runtime.renderer.plan(prompt, context, chat_template_kwargs=template_options, tools=tools)
        if plan.base is not None:
            self._runtime.crossing.check_model(plan.base)
        return plan, crossed

    def _prompt_request(self, plan: PromptPlan, options: ThinkOptions | GenerateOptions) -> Request:
        # a prefix only saves work, so one of another model is simply of no use
        prefix = plan.reuse if plan.reuse is not None and self._is_ours(plan.reuse) else None
        request = self._request(plan.base, plan.token_ids, prefix)
        _limit(request, options.get("timeout"), options.get("source") or "")
        return request

    def _request(
        self, base: Context | None, prompt_ids: tuple[int, ...] = (), prefix: Context | None = None
    ) -> Request:
        stored = ((source, kv) for source in (prefix, base) if (kv := self._stored_kv(source)))
        host_context, host_kv = next(stored, (None, None))
        request = Request(self._owner, base, prompt_ids, prefix, host_kv, host_context, extras=self._model.extras)
        if any(isinstance(segment, SplicedSegment) for segment in request.lineage):
            request.extras = (*request.extras, self._model.splices)
        return request

    def _report(self, relation: str, notes: tuple[str, ...] = (), crossed: Handoff | None = None) -> Report:
        loaded = self._loaded
        return Report(loaded.fingerprint, loaded.dtype_name, relation, notes, crossed)

    def _is_ours(self, context: Context) -> bool:
        loaded = self._loaded
        return (context.fingerprint, context.dtype) == (loaded.fingerprint, loaded.dtype_name)

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

    def check_receivable(self, context: Context) -> None:
        """Refuse a context that is neither this model's nor of one that an engine of this process runs.

        Raises:
            FingerprintMismatchError: It is one.
        """
        self._crossing.check(context)


def _carries_contexts(prompt: Prompt) -> bool:
    return any(isinstance(message, Mapping) and message.get("context") is not None for message in prompt)


def _limit(request: Request, timeout: float | None, source: str) -> None:
    if timeout is not None and timeout <= 0:
        raise ConfigurationError(f"timeout must be positive, not {timeout}.")
    request.source = source
    request.deadline = request.submitted + timeout if timeout is not None else None


def sampling_params(
    options: GenerateOptions | Mapping[str, Any], *, vocab_limit: int, eos_token_ids: Iterable[int] = ()
) -> SamplingParams:
    """Check a request's options; None is an option's default. `grammar`, `timeout` and `source` are checked elsewhere.

    Args:
        options: As given to `generate`.
        vocab_limit: Number of ids the tokenizer knows; ids from there on are padding rows of the head.
        eos_token_ids: The model's own end-of-sequence ids.

    Raises:
        ConfigurationError: An option is unknown or out of its range.
    """
    known = GenerateOptions.__annotations__
    if unknown := sorted(set(options) - set(known)):
        raise ConfigurationError(f"Unknown option {unknown[0]!r}; known options: {', '.join(known)}.")
    given = {name: value for name, value in options.items() if value is not None}
    max_tokens = _integer("max_tokens", given["max_tokens"], low=1) if "max_tokens" in given else None
    most = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    min_tokens = _integer("min_tokens", given.get("min_tokens", 0), low=0, high=most, high_name="max_tokens")
    stop_token_ids = set(eos_token_ids) | _stop_token_ids(given.get("stop_token_ids", ()), vocab_limit)
    if min_tokens and stop_token_ids.issuperset(range(vocab_limit)):
        raise ConfigurationError("min_tokens needs at least one token that is not in stop_token_ids.")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_real("temperature", given.get("temperature", 0.0), "[0, inf)"),
        top_p=_real("top_p", given.get("top_p", 1.0), "(0, 1]"),
        top_k=_integer("top_k", given.get("top_k", 0), low=0),
        min_p=_real("min_p", given.get("min_p", 0.0), "[0, 1)"),
        repetition_penalty=_real("repetition_penalty", given.get("repetition_penalty", 1.0), "(0, inf)"),
        seed=_integer("seed", given["seed"]) if "seed" in given else secrets.randbits(63),
        logprobs=_integer("logprobs", given["logprobs"], low=0, high=MAX_LOGPROBS) if "logprobs" in given else None,
        stop=_stop_strings(given.get("stop", ())),
        stop_token_ids=tuple(sorted(stop_token_ids)),
    )


def _integer(
    name: str, value: Any, *, low: int | None = None, high: int | None = None, high_name: str | None = None
) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ConfigurationError(f"{name} must be an integer, not {value!r}.")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        upper = "" if high is None else f" and at most {high}" + (f" ({high_name})" if high_name else "")
        raise ConfigurationError(f"{name} must be at least {low}{upper}, not {number}.")
    return number


def _real(name: str, value: Any, interval: str) -> float:
    """`value` as a float within `interval`, written as mathematicians do: ``"(0, 1]"``."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ConfigurationError(f"{name} must be a number in {interval}, not {value!r}.")
    number = float(value)
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ConfigurationError(f"{name} must be in {interval}, not {value}.")
    return number


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise ConfigurationError(f"stop must be a non-empty string or a list of such, not {value!r}.")
    if len(strings) > MAX_STOP_STRINGS:
        raise ConfigurationError(f"stop takes at most {MAX_STOP_STRINGS} strings, not {len(strings)}.")
    return tuple(dict.fromkeys(strings))


def _stop_token_ids(value: Any, vocab_limit: int) -> set[int]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigurationError(f"stop_token_ids must be a list of token ids, not {value!r}.")
    return {_integer("each of stop_token_ids", token_id, low=0, high=vocab_limit - 1) for token_id in value}
