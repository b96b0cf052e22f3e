"""What a client of the OpenAI-compatible endpoint asks for. What the engine does not have is refused, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from avp_agents.agent.turns import HandedMessage
from avp_agents.answer.grammar import Grammar
from avp_agents.errors import ConfigurationError, ModelNotFoundError
from avp_agents.transport.json_fields import Fields
from avp_agents.transport.problems import Refusal
from avp_agents.transport.server.chat_turns import HANDLE_FIELD, read_message
from avp_agents.transport.server.options import read_stop

_MAX_TOP_LOGPROBS = 20
_ENGINE_OPTIONS = (("top_k", int), ("min_p", float), ("repetition_penalty", float), ("min_tokens", int))

# Options of which the engine has one value only: that one may be asked for.
_ONLY: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "modalities": ["text"],
    "tools": [],
    "store": False,
    "service_tier": "auto",
}


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion that was asked for.

    Attributes:
        messages: With the handles of the contexts that they claim to stand for; untrusted.
        handle: A context to answer on; untrusted.
        scope: Where handles are minted and honoured: the request's ``user``.
        options: For `Engine.astream`.
        stream: Whether to answer with events.
        include_usage: Whether an event at the end tells the usage.
        logprobs: Whether to tell log-probabilities.
    """

    messages: Sequence[HandedMessage]
    handle: Any
    scope: str
    options: dict[str, Any]
    stream: bool
    include_usage: bool
    logprobs: bool


def read_chat_request(fields: Fields, model: str) -> ChatRequest:
    """Read a request's body.

    Args:
        fields: Untrusted.
        model: The name that this server's model goes by.

    Raises:
        ConfigurationError: An option is malformed, unknown, or one that the engine does not have.
        PromptError: A message is malformed.
        Refusal: 404, another model.
    """
    asked = fields.require("model", str)
    if asked != model:
        error = ModelNotFoundError(f"This server has the model {model!r}, not {asked[:100]!r}.")
        raise Refusal(404, error, code="model_not_found")
    messages = [read_message(i, message) for i, message in enumerate(fields.require("messages", list))]
    stream, stream_options = fields.get("stream", bool, False), fields.get("stream_options", dict)
    logprobs, options = _read_options(fields)
    scope, handle = fields.get("user", str, ""), fields.anything(HANDLE_FIELD)
    for name, value in _ONLY.items():
        if (given := fields.anything(name)) not in (None, value):
            raise ConfigurationError(f"{name}={str(given)[:60]!r} is not supported here, only {value!r}.")
    fields.end()
    return ChatRequest(messages, handle, scope, options, stream, _include_usage(stream, stream_options), logprobs)


def _read_options(fields: Fields) -> tuple[bool, dict[str, Any]]:
    """Whether log-probabilities are to be told, and the engine's options. OpenAI's defaults hold."""
    most, old_most = fields.get("max_completion_tokens", int), fields.get("max_tokens", int)
    logprobs, top = fields.get("logprobs", bool, False), fields.get("top_logprobs", int)
    if top is not None and not (logprobs and 0 <= top <= _MAX_TOP_LOGPROBS):
        raise ConfigurationError(f"top_logprobs is 0 to {_MAX_TOP_LOGPROBS}, and needs logprobs=true.")
    options: dict[str, Any] = {
        "max_tokens": most if most is not None else old_most,
        "temperature": fields.get("temperature", float, 1.0),
        "top_p": fields.get("top_p", float, 1.0),
        "seed": fields.get("seed", int),
        "stop": read_stop(fields),
        "logprobs": (top or 0) if logprobs else None,
        "grammar": _read_response_format(fields.get("response_format", dict)),
        "chat_template_kwargs": fields.get("chat_template_kwargs", dict),
    }
    options |= {name: fields.get(name, kind) for name, kind in _ENGINE_OPTIONS}
    return logprobs, {name: value for name, value in options.items() if value is not None}


def _read_response_format(data: dict[str, Any] | None) -> Grammar | None:
    """Plain text, any JSON object, or JSON of a schema."""
    if data is None:
        return None
    fields = Fields(data, "response_format")
    kind, described = fields.require("type", str), fields.get("json_schema", dict)
    fields.end()
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_schema({"type": "object"})
    if kind != "json_schema" or described is None:
        raise ConfigurationError("response_format's type is text, json_object, or json_schema with a 'json_schema'.")
    return Grammar.json_schema(described.get("schema") or {}, strict=described.get("strict") is True)


def _include_usage(stream: bool, stream_options: dict[str, Any] | None) -> bool:
    if stream_options is None:
        return False
    if not stream:
        raise ConfigurationError("stream_options needs stream=true.")
    options = Fields(stream_options, "stream_options")
    include, obfuscation = options.get("include_usage", bool, False), options.get("include_obfuscation", bool, False)
    options.end()
    if obfuscation:
        raise ConfigurationError("include_obfuscation is not supported here.")
    return include
