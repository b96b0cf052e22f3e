"""Spans for OpenTelemetry, named by its conventions for generative AI; nothing at all where it is not installed.

    chat {model}, think {model}, replay {model}     one request to an engine, until its last token
    avp.handoff                                     finding the contexts of a prompt's handles
    avp.store.put, avp.store.get                    one look into a context store; tiers are nested

Beside ``gen_ai.*`` a request's span says how its context reached it (``avp.handoff.mode``, ...). No prompt and no
answer is recorded. Spans go to whatever provider the application has set up.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from avp_agents.usage import Handoff, Usage

try:
    from opentelemetry import trace
except ModuleNotFoundError:
    trace = None

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_SCOPE = "avp_agents"
_SYSTEM = "avp"
_REQUEST_ATTRIBUTES = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "steps": "avp.request.latent_steps",
}


class Operation:
    """The span of one request. It ends once: with the result, an error, or when the caller leaves.

    As a context manager it ends at the end of the block; leaving a generator early is no error.
    """

    def __init__(self, span: Span | None) -> None:
        self._span = span

    def result(self, usage: Usage, handoff: Handoff, finish_reason: str | None = None) -> None:
        """Note what the request cost, and how its context reached it."""
        if self._span is None:
            return
        self._span.set_attributes(_result_attributes(usage, handoff))
        if finish_reason is not None:
            self._span.set_attribute("gen_ai.response.finish_reasons", [finish_reason])

    def fail(self, error: BaseException) -> None:
        """Note why there is no result, and end."""
        if self._span is not None:
            _note_error(self._span, error)
        self.end()

    def end(self) -> None:
        """End the span, unless it has ended."""
        span, self._span = self._span, None
        if span is not None:
            span.end()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """A block that fails the request where it raises, and else leaves it open."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, GeneratorExit):
            self.end()
        else:
            self.fail(error)


def start_operation(name: str, model: str, options: Mapping[str, Any] | None = None) -> Operation:
    """The span of a request that begins now, a child of the caller's current span.

    Args:
        name: ``"chat"``, ``"think"`` or ``"replay"``.
        model: Its name, or folder.
        options: The request's options; those that the conventions have a name for are noted.
    """
    if trace is None:
        return Operation(None)
    shown = os.path.basename(model) if os.path.isabs(model) else model
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": name,
        "gen_ai.provider.name": _SYSTEM,
        "gen_ai.request.model": shown,
    }
    for option, attribute in _REQUEST_ATTRIBUTES.items():
        if options is not None and options.get(option) is not None:
            attributes[attribute] = options[option]
    return Operation(trace.get_tracer(_SCOPE).start_span(f"{name} {shown}", attributes=attributes))


@contextmanager
def span(name: str) -> Iterator[Callable[[str, Any], None]]:
    """A span around a block, the current one within it. Yields a function that sets an attribute."""
    if trace is None:
        yield _ignore
        return
    with trace.get_tracer(_SCOPE).start_as_current_span(
        name, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current.set_attribute
        except BaseException as error:
            _note_error(current, error)
            raise


def traced(name: str, describe: Callable[[Any], Mapping[str, Any]]) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that puts a span around a method of a store.

    Args:
        name: The span's name.
        describe: Attributes that follow from the method's result.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        if trace is None:
            return method

        @functools.wraps(method)
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            with span(name) as note:
                note("avp.store.kind", type(self).__name__)
                note("avp.namespace", self.namespace.name)
                result = method(self, *arguments, **options)
                for attribute, value in describe(result).items():
                    note(attribute, value)
                return result

        return call

    return decorate


def _ignore(attribute: str, value: Any) -> None:
    """Where nobody listens."""


def _note_error(current: Span, error: BaseException) -> None:
    assert trace is not None
    current.set_attribute("error.type", type(error).__qualname__)
    current.set_status(trace.StatusCode.ERROR, str(error))


def _result_attributes(usage: Usage, handoff: Handoff) -> dict[str, Any]:
    """As everywhere in the conventions, output tokens include reasoning, which here is latent steps."""
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens + usage.latent_steps,
        "gen_ai.usage.cache_read.input_tokens": usage.positions_reused,
        "gen_ai.usage.reasoning.output_tokens": usage.latent_steps,
        "avp.latent_steps": usage.latent_steps,
        "avp.queue_seconds": usage.queue_seconds,
        "avp.prefill_seconds": usage.prefill_seconds,
        "avp.latent_seconds": usage.latent_seconds,
        "avp.decode_seconds": usage.decode_seconds,
        "avp.handoff.mode": handoff.mode,
        "avp.handoff.reason": handoff.reason,
        "avp.handoff.bytes": handoff.bytes,
        "avp.handoff.milliseconds": handoff.milliseconds,
        "avp.handoff.positions_reused": handoff.positions_reused,
        "avp.handoff.positions_replayed": handoff.positions_replayed,
    }
