"""Options of think and generate as JSON: the engine trusts its callers to pass the right types, so they are checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast, get_args

from avp_agents.answer.grammar import Grammar, GrammarKind
from avp_agents.answer.options import GenerateOptions, ThinkOptions
from avp_agents.errors import ConfigurationError
from avp_agents.transport.json_fields import Fields

_KINDS: dict[str, type[Any]] = {
    "method": str, "k": int, "temperature": float, "renormalise": bool, "stop_cosine": float, "stop_entropy": float,
    "tools": list, "chat_template_kwargs": dict, "timeout": float, "source": str, "max_tokens": int, "min_tokens": int,
    "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float, "seed": int, "logprobs": int,
    "stop_token_ids": list, "skip_special_tokens": bool,
}  # fmt: skip
_NOT_NONE = frozenset({"temperature", "tools", "top_p", "top_k", "min_p", "min_tokens", "skip_special_tokens"})
"""Options that have no None: there it means the engine's default, as if they were missing."""

THINK_OPTIONS = tuple(ThinkOptions.__annotations__)
GENERATE_OPTIONS = tuple(GenerateOptions.__annotations__)


def read_options(data: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The engine's options out of a request; untrusted. Whether their values are in range is the engine's check.

    Args:
        data: The request's options.
        known: `THINK_OPTIONS` or `GENERATE_OPTIONS`.

    Raises:
        ConfigurationError: One is unknown, or of the wrong kind.
    """
    if unknown := sorted(data.keys() - set(known)):
        raise ConfigurationError(f"Unknown option {unknown[0][:60]!r}; known options: {', '.join(known)}.")
    fields = Fields(data, "'options'")
    read: dict[str, Any] = {}
    for name in data:
        value = _READERS[name](fields) if name in _READERS else fields.get(name, _KINDS[name])
        if value is not None or name not in _NOT_NONE:
            read[name] = value
    return read


def read_stop(fields: Fields) -> str | list[str] | None:
    """Strings that end an answer.

    Raises:
        ConfigurationError: They are neither a string nor a list of strings.
    """
    value = fields.anything("stop")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(string, str) for string in value):
        return value
    raise ConfigurationError("'stop' must be a string or a list of strings.")


def _read_tools(fields: Fields) -> list[dict[str, Any]] | None:
    tools = fields.get("tools", list)
    if tools is not None and not all(isinstance(tool, dict) for tool in tools):
        raise ConfigurationError("'tools' must be a list of objects.")
    return tools


def _read_grammar(fields: Fields) -> Grammar | None:
    data = fields.get("grammar", dict)
    if data is None:
        return None
    told = Fields(data, "'grammar'")
    kind, source = told.require("kind", str), told.require("source", str)
    told.end()
    if kind not in get_args(GrammarKind):
        raise ConfigurationError(f"A grammar's kind is one of {', '.join(get_args(GrammarKind))}.")
    return Grammar(cast("GrammarKind", kind), source)


_READERS = {"stop": read_stop, "tools": _read_tools, "grammar": _read_grammar}
