"""Errors that both sides know: each is an `AvpError` of the engine, and the `ModelError` of LangChain for the same.

LangChain's middleware acts on its own: it summarises after a `ContextOverflowError`, and retries what may succeed then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from langchain_core import exceptions as langchain

from avp_agents.errors import (
    ContextWindowError,
    EngineBusyError,
    ModelNotFoundError,
    PromptError,
    RequestTimeoutError,
)


class AvpContextOverflowError(ContextWindowError, langchain.ContextOverflowError):
    """The request does not fit the model's window; LangChain's `ContextOverflowError`."""


class AvpInvalidRequestError(PromptError, langchain.ModelInvalidRequestError):
    """The messages cannot be rendered for this model; LangChain's `ModelInvalidRequestError`."""


class AvpTimeoutError(RequestTimeoutError, langchain.ModelTimeoutError):
    """The request ran out of its time; LangChain's `ModelTimeoutError`, which may be retried."""


class AvpBusyError(EngineBusyError, langchain.ModelRateLimitError):
    """The engine's queue is full; LangChain's `ModelRateLimitError`, which may be retried."""


class AvpModelNotFoundError(ModelNotFoundError, langchain.ModelNotFoundError):
    """No source has the model; LangChain's error of the same name."""


_BY_MESSAGE: dict[type[Exception], type[Exception]] = {
    PromptError: AvpInvalidRequestError,
    RequestTimeoutError: AvpTimeoutError,
    EngineBusyError: AvpBusyError,
    ModelNotFoundError: AvpModelNotFoundError,
}


@contextmanager
def known_to_langchain() -> Iterator[None]:
    """Raise the engine's errors as the classes of this module, where there is one."""
    try:
        yield
    except ContextWindowError as error:
        raise AvpContextOverflowError(
            window=error.window, context=error.context, prompt=error.prompt, requested=error.requested
        ) from error
    except tuple(_BY_MESSAGE) as error:
        kind = next(kind for base, kind in _BY_MESSAGE.items() if isinstance(error, base))
        raise kind(str(error)) from error
