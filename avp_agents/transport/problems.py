"""Errors on the wire: the JSON that an error becomes, in OpenAI's form, and the error that such JSON becomes again.

    {"error": {"message": "...", "type": "invalid_request_error", "param": null, "code": "ContextWindowError",
               "details": {"window": 2048, ...}}}

``code`` is the name of the class in `avp_agents.errors`, so that a client raises what the engine raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from avp_agents import errors
from avp_agents.errors import AvpError, ContextWindowError, EngineError, TransportError

_STATUS: dict[type[AvpError], int] = {
    errors.ConfigurationError: 400,
    errors.PromptError: 400,
    errors.ContextWindowError: 400,
    errors.InvalidHandleError: 400,
    errors.AuthenticationError: 401,
    errors.ContextLostError: 404,
    errors.NotStoredError: 404,
    errors.ModelNotFoundError: 404,
    errors.FingerprintMismatchError: 409,
    errors.LimitExceededError: 413,
    errors.KvMemoryError: 413,
    errors.IntegrityError: 422,
    errors.RequestCancelledError: 499,
    errors.EngineBusyError: 503,
    errors.EngineClosedError: 503,
    errors.StoreUnavailableError: 503,
    errors.RequestTimeoutError: 504,
    errors.StoreFullError: 507,
    errors.ProtocolError: 400,
    errors.FrameLimitError: 413,
    errors.FrameIntegrityError: 422,
}
_OUR_FAULT = 500


class Refusal(Exception):
    """A request that ends with a status of its own, before or beside the engine.

    Args:
        status: The HTTP status.
        error: What the client is told.
        headers: More response headers.
        code: In place of the error's class name.
    """

    def __init__(
        self, status: int, error: AvpError, *, headers: Mapping[str, str] | None = None, code: str | None = None
    ) -> None:
        super().__init__(str(error))
        self.status, self.error, self.headers, self.code = status, error, dict(headers or {}), code


def status_of(error: AvpError) -> int:
    """The HTTP status of an error that the engine, a store or the protocol raised."""
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), _OUR_FAULT)


def error_json(error: AvpError, status: int, code: str | None = None) -> dict[str, Any]:
    """The body of an error response."""
    body: dict[str, Any] = {
        "message": str(error),
        "type": _openai_type(status),
        "param": None,
        "code": code or type(error).__name__,
    }
    if isinstance(error, ContextWindowError):
        body["details"] = {name: getattr(error, name) for name in ("window", "context", "prompt", "requested")}
    return {"error": body}


def _openai_type(status: int) -> str:
    if status in (401, 403):
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_from_json(status: int, body: object) -> AvpError:
    """The error that a server reported, as its class in `avp_agents.errors`.

    Args:
        status: The HTTP status.
        body: The response's JSON; untrusted.
    """
    told = body.get("error") if isinstance(body, dict) else None
    if not isinstance(told, dict):
        return TransportError(f"The server answered with status {status} and no explanation.")
    message, details = str(told.get("message", "")), told.get("details")
    kind = getattr(errors, str(told.get("code")), None)
    if kind is ContextWindowError:
        return _window_error(details) or EngineError(message)
    if isinstance(kind, type) and issubclass(kind, AvpError):
        return kind(message)
    return TransportError(f"The server answered with status {status}: {message}")


def _window_error(details: object) -> ContextWindowError | None:
    names = ("window", "context", "prompt", "requested")
    if not isinstance(details, dict) or not all(type(details.get(name)) is int for name in names):
        return None
    return ContextWindowError(**{name: details[name] for name in names})
