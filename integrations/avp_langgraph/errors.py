"""Errors that both sides know: each is an `AvpError` of the engine, and the `ModelError` of LangChain for the same.

LangChain's middleware acts on its own: it summarises after a `ContextOverflowError`, and retries what may succeed then.
"""

from __future__ import annotations

from typing import NoReturn

from langchain_core import exceptions as langchain

from avp_agents.errors import (
    AvpError,
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


_BY_MESSAGE: dict[type[AvpError], type[AvpError]] = {
    PromptError: AvpInvalidRequestError,
    RequestTimeoutError: AvpTimeoutError,
    EngineBusyError: AvpBusyError,
    ModelNotFoundError: AvpModelNotFoundError,
}


def raise_known(error: AvpError) -> NoReturn:
    """Raise the engine's error as the class of this module, where there is one."""
    if isinstance(error, ContextWindowError):
        raise AvpContextOverflowError(
            window=error.window, context=error.context, prompt=error.prompt, requested=error.requested
        ) from error
    if kind := next((kind for base, kind in _BY_MESSAGE.items() if isinstance(error, base)), None):
        raise kind(str(error)) from error
    raise error
