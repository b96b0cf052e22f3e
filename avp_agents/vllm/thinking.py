"""A thought inside vLLM, by the plugin for latent steps: the only place where engine and plugin meet.

thought_request(steps, options)    checks what was asked for
ThinkingRequest                    the request, which ends with a context
"""

from __future__ import annotations

import warnings
from typing import Any

from avp_agents.answer.options import ThinkOptions
from avp_agents.context import Context, LatentSegment
from avp_agents.errors import ConfigurationError, UnsupportedModelError
from avp_agents.vllm.answer import Order, VllmRequest
from avp_agents.vllm.backend import DecodingOptions, Facts, Step
from avp_agents.vllm.plugin.request import ReturnedThought, ThoughtRequest, read_thought

DEGENERATE_STEPS = 40
_OPTIONS = tuple(ThinkOptions.__annotations__)
_NOT_LATENT = ("chat_template_kwargs", "tools", "timeout", "source")


def thought_request(steps: int, options: ThinkOptions, facts: Facts) -> ThoughtRequest:
    """What the plugin is asked for.

    Raises:
        UnsupportedModelError: vLLM runs without the plugin.
        ConfigurationError: An option is unknown or out of range.
    """
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise ConfigurationError(f"Unknown option {unknown[0]!r}; known options: {', '.join(_OPTIONS)}.")
    if not facts.thinks:
        raise UnsupportedModelError(
            "vLLM runs without latent steps. Make the engine with VllmEngine.from_pretrained(..., latent_steps=True), "
            "or think with a LatentEngine on the same weights: its contexts go on here."
        )
    latent: dict[str, Any] = {name: value for name, value in options.items() if name not in _NOT_LATENT}
    if steps > DEGENERATE_STEPS:
        warnings.warn(f"{steps} latent steps: quality falls from {DEGENERATE_STEPS} on.", stacklevel=5)
    return ThoughtRequest(steps, **latent)


class ThinkingRequest(VllmRequest[Context]):
    """Runs latent steps. The tokens that vLLM decodes meanwhile stand for them, and mean nothing.

    Args:
        order: See `Order`.
        asked: What the plugin is asked for.
    """

    def __init__(self, order: Order, asked: ThoughtRequest) -> None:
        body = asked.http_body()
        transfer = body.pop("kv_transfer_params")
        super().__init__(order, DecodingOptions(body, transfer=transfer, wants_transfer=True))
        self._thought: ReturnedThought | None = None
        self._closed = False

    @property
    def done(self) -> bool:
        """When vLLM has ended, not earlier."""
        return self._closed

    def note(self, step: Step) -> None:
        """Take the thought.

        Raises:
            NumericalError: NaN or Inf came out of the model.
            EngineError: There is no thought, though vLLM has ended.
        """
        super().note(step)
        if step.finished:
            self._thought = read_thought(step.transfer)

    def close(self) -> None:
        """vLLM has ended."""
        self._closed = True

    def end(self) -> Context:
        """The context."""
        thought = self._thought
        assert thought is not None
        steps = len(thought.embeddings)
        lineage = self.order.lineage
        if steps:
            lineage = (*lineage, LatentSegment(thought.embeddings, thought.recipe))
        return self.make_context(lineage, self.usage(latent_steps=steps), thought.readout)
