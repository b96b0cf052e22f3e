"""From a caller's prompt and options to a request for vLLM: rendering, checks, limits."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from avp_agents.answer.builder import CLOSING, AnswerBuilder
from avp_agents.answer.detokenizer import TextStream
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.context import Context
from avp_agents.engine.core.sampling import SamplingParams
from avp_agents.engine.join import Joiner
from avp_agents.engine.protocol import JoinStrategy
from avp_agents.engine.requests import sampling_params
from avp_agents.errors import ConfigurationError, ContextWindowError, UnsupportedModelError
from avp_agents.lineage import in_dtype
from avp_agents.prompt.chat_messages import Message, Prompt
from avp_agents.prompt.plan import PromptPlan
from avp_agents.usage import Handoff, HandoffMode, Usage
from avp_agents.vllm.answer import Answering, Order, Replaying
from avp_agents.vllm.backend import DecodingOptions, Facts
from avp_agents.vllm.constraining import Marker, structured_outputs
from avp_agents.vllm.plugin.kv_request import KvRequest
from avp_agents.vllm.served_model import ServedModel
from avp_agents.vllm.thinking import ThinkingRequest, thought_request


class VllmRequestBuilder:
    """Makes requests for one model. Everything that can be checked before vLLM is asked is checked here.

    Args:
        model: The model.
        facts: How vLLM was set up.
        loads_kv: Whether vLLM reads keys and values of stored contexts by itself.
    """

    def __init__(self, model: ServedModel, facts: Facts, *, loads_kv: bool) -> None:
        self._model, self._facts, self._loads_kv = model, facts, loads_kv

    def answering(self, prompt: Prompt, context: Context | None, options: GenerateOptions) -> Answering:
        """A generate request. See `VllmEngine.generate`."""
        model = self._model
        stop_ids = model.renderer.stop_ids
        params = sampling_params(options, vocab_limit=model.vocabulary_size, eos_token_ids=stop_ids)
        plan = self._plan(prompt, context, options)
        max_tokens = params.token_budget(self._facts.window - len(plan))
        plan.check_window(self._facts.window, max(1, max_tokens))
        sampling = _sampling(params, max_tokens, seeded=options.get("seed") is not None)
        decoding = DecodingOptions(sampling, params.logprobs)
        constraint = None
        if (grammar := options.get("grammar")) is not None:
            if params.min_tokens:
                raise ConfigurationError("vLLM cannot keep to min_tokens and a grammar at once; leave one of them out.")
            after = Marker(CLOSING, model.control_id(CLOSING)) if plan.opens_reasoning else None
            constraint = model.grammars.constraint(grammar, max_tokens, after=after.text if after else None)
            decoding = replace(decoding, structured=structured_outputs(grammar, after=after))
        skips = options.get("skip_special_tokens", True)
        text = TextStream(model.tokenizer, params.stop, min_tokens=params.min_tokens, skip_special_tokens=skips)
        split = plan.reasoning_split(marked=model.renderer.marks_reasoning)
        stop_ids = frozenset(params.stop_token_ids)
        asked = params.logprobs is not None
        builder = AnswerBuilder(max_tokens, stop_ids, text, split, model.token_text, logprobs=asked)
        return Answering(self._order(plan, options), decoding, builder, constraint)

    def thinking(self, prompt: Prompt, steps: int, context: Context | None, options: ThinkOptions) -> ThinkingRequest:
        """A think request. See `VllmEngine.think`."""
        asked = thought_request(steps, options, self._facts)
        plan = self._plan(prompt, context, options)
        plan.check_window(self._facts.window, asked.max_tokens)
        return ThinkingRequest(self._order(plan, options), asked)

    def replaying(self, context: Context) -> Replaying:
        """A replay request. See `VllmEngine.replay`."""
        context = self._replayable(context)
        return Replaying(Order(self._identity, context, (), "replay", kv=self._stored_kv(context)))

    def saving(self, context: Context, timeout: float) -> Replaying:
        """A request for which vLLM saves keys and values. See `VllmEngine.save_kv`.

        Raises:
            NotStoredError: The context was never stored.
            ConfigurationError: vLLM has no store, or the context is in another dtype.
        """
        if not self._loads_kv:
            raise ConfigurationError("This engine has no kv_store: make it with VllmEngine...(kv_store=url).")
        handle = context.to_handle()
        if self._replayable(context) is not context:
            raise ConfigurationError(f"The context is in {context.dtype}, and vLLM runs in {self._facts.dtype}.")
        kv = KvRequest(save=handle.id)
        return Replaying(Order(self._identity, context, (), "save", timeout=timeout, kv=kv))

    def joined(self, contexts: Seq[Context], strategy: JoinStrategy) -> Context:
        """Several contexts as one. See `VllmEngine.join`."""
        contexts = [self._cast(context) for context in contexts]
        for context in contexts:
            self.check_receivable(context)
        if strategy == "splice":
            raise UnsupportedModelError(
                "vLLM cannot compute positions that do not see all of those before them, so contexts are not spliced "
                "for it. Use strategy='replay' or 'text'."
            )
        joined = Joiner(self._model.renderer.whole_turns).join(contexts, strategy)
        context = Context(*self._identity, joined.lineage)
        self._check_fits(context)
        mode: HandoffMode = "text" if joined.strategy == "text" else "replay"
        alone = "one context: nothing to join"
        reason = f"{joined.contexts} contexts joined by {joined.strategy}" if joined.strategy else alone
        notes = (*joined.notes, "vLLM computes it with the next request")
        context.attach(usage=Usage(prompt_tokens=len(context)), handoff=Handoff(mode, reason, notes=notes))
        return context

    def check_receivable(self, context: Context) -> None:
        """Refuse a context that is not this model's, whatever its dtype.

        Raises:
            FingerprintMismatchError: It belongs to another model.
            IntegrityError: It holds values that this model cannot have made.
        """
        self._model.check(context)

    @property
    def _identity(self) -> tuple[str, str]:
        return self._model.fingerprint, self._facts.dtype

    def _replayable(self, context: Context) -> Context:
        context = self._cast(context)
        self.check_receivable(context)
        self._check_fits(context)
        return context

    def _check_fits(self, context: Context) -> None:
        if len(context) >= self._facts.window:
            raise ContextWindowError(window=self._facts.window, context=len(context), prompt=0, requested=1)

    def _stored_kv(self, base: Context | None) -> KvRequest | None:
        """What vLLM can load of a context: what the store it came from has, which is the one that vLLM reads."""
        if not self._loads_kv or base is None or base.handle is None or base.kv is None or base.kv.on_device:
            return None
        return KvRequest(load=base.handle.id, positions=min(base.kv.length, len(base)))

    def _plan(self, prompt: Prompt, context: Context | None, options: GenerateOptions | ThinkOptions) -> PromptPlan:
        """What stands in vLLM's prompt. Contexts of the same weights in another dtype are cast."""
        plan = self._model.renderer.plan(
            self._with_contexts_cast(prompt),
            None if context is None else self._cast(context),
            chat_template_kwargs=options.get("chat_template_kwargs"),
            tools=options.get("tools") or (),
        )
        if plan.base is not None:
            self.check_receivable(plan.base)
        return plan

    def _with_contexts_cast(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, str):
            return prompt
        return [self._with_context_cast(message) for message in prompt]

    def _with_context_cast(self, message: Message) -> Message:
        context = message.get("context") if isinstance(message, Mapping) else None
        return {**message, "context": self._cast(context)} if isinstance(context, Context) else message

    def _cast(self, context: Context) -> Context:
        dtype = self._facts.dtype
        is_other = context.dtype != dtype and context.fingerprint == self._model.fingerprint
        return in_dtype(context, dtype) if is_other else context

    def _order(self, plan: PromptPlan, options: GenerateOptions | ThinkOptions) -> Order:
        timeout = options.get("timeout")
        if timeout is not None and timeout <= 0:
            raise ConfigurationError(f"timeout must be positive, not {timeout}.")
        return Order(
            self._identity,
            plan.base,
            plan.token_ids,
            plan.relation,
            plan.notes,
            timeout=timeout,
            kv=self._stored_kv(plan.base),
        )


def _sampling(params: SamplingParams, max_tokens: int, *, seeded: bool) -> dict[str, Any]:
    """Sampling parameters as vLLM calls them. All are named, so that a server's own defaults have no say.

    Stop strings are looked for here, where text is made of ids.
    """
    sampling = {
        "max_tokens": max_tokens,
        "min_tokens": params.min_tokens,
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop_token_ids": list(params.stop_token_ids),
    }
    # a seed makes vLLM draw for this request alone, which is slower; without one it need not
    return sampling | {"seed": params.seed} if seeded else sampling
