"""`with_structured_output`: from a schema to what a call asks for, and from its answer to the schema's values."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal, get_args

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from avp_agents.errors import ConfigurationError

Method = Literal["json_schema", "function_calling", "json_mode"]
Schema = Mapping[str, Any] | type

_ANY = {"title": "answer", "type": "object", "properties": {}}
"""What structured output without a schema is called in traces."""

_TOOL_KEYS = frozenset({"function", "parameters", "input_schema"})
"""What tells a tool of some API from a JSON schema."""


def structured(
    model: BaseChatModel,
    schema: Schema | None,
    method: Method,
    *,
    strict: bool | None,
    include_raw: bool,
    bound: Mapping[str, Any],
) -> Runnable[LanguageModelInput, Any]:
    """A model whose answers are values of a schema; see `AvpChatModel.with_structured_output`.

    Args:
        model: Takes ``response_format`` (see `Constraints`) and tools.
        schema, method, strict, include_raw: As given to `with_structured_output`.
        bound: What else the model is given with every call.

    Raises:
        ConfigurationError: The method is unknown, or the schema is missing or of no known kind.
    """
    if method not in get_args(Method):
        raise ConfigurationError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}.")
    if schema is None and method != "json_mode":
        raise ConfigurationError(f"method={method!r} needs a schema; pass one, or use method='json_mode'.")
    traced = {"kwargs": {"method": method, "strict": strict}, "schema": schema or _ANY}
    if method == "function_calling" and schema is not None:
        tool: Any = _as_given(schema)
        llm = model.bind_tools([tool], tool_choice="any", strict=strict, ls_structured_output_format=traced, **bound)
        return _parsed(llm, _call_parser(schema), include_raw=include_raw)
    asked = _response_format(schema, method, strict)
    llm = model.bind(response_format=asked, ls_structured_output_format=traced, **bound)
    return _parsed(llm, _json_parser(schema), include_raw=include_raw)


def _response_format(schema: Schema | None, method: Method, strict: bool | None) -> dict[str, Any]:
    """What a call is given so that its answer is JSON of the schema."""
    if schema is None:
        return {"type": "json_object"}
    json_schema = as_json_schema(schema)
    if method == "json_mode":
        return {"type": "json_object", "schema": json_schema}
    named = {"name": json_schema.get("title", "answer"), "schema": json_schema}
    return {"type": "json_schema", "json_schema": named | ({} if strict is None else {"strict": strict})}


def _json_parser(schema: Schema | None) -> BaseOutputParser[Any]:
    """From an answer's text to the schema's values: pydantic objects for pydantic classes, else dicts."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticOutputParser(pydantic_object=schema)
    return JsonOutputParser()


def _call_parser(schema: Schema) -> BaseOutputParser[Any]:
    """From a forced call's arguments to the schema's values."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    name = convert_to_openai_tool(_as_given(schema))["function"]["name"]
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _parsed(llm: Runnable[Any, AIMessage], parser: BaseOutputParser[Any], *, include_raw: bool) -> Runnable[Any, Any]:
    """The model with its parser; with `include_raw`, a dict of the message, its value, and why there is none."""
    if not include_raw:
        return llm | parser
    read = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    unread = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=llm) | read.with_fallbacks([unread], exception_key="parsing_error")


def as_json_schema(schema: Schema) -> dict[str, Any]:
    """The JSON schema of a pydantic class, a TypedDict, or an OpenAI tool; a JSON schema stays what it is.

    Raises:
        ConfigurationError: It is none of these.
    """
    if isinstance(schema, Mapping) and _TOOL_KEYS.isdisjoint(schema):
        return dict(schema)
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    try:
        return convert_to_json_schema(_as_given(schema))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"No schema can be made of {schema!r} ({error}); pass a pydantic class, a TypedDict, a JSON schema or "
            "an OpenAI tool."
        ) from error


def _as_given(schema: Schema) -> dict[str, Any] | type:
    return dict(schema) if isinstance(schema, Mapping) else schema
