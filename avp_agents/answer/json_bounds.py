"""Schemas with limits where they have none, so that a model that repeats itself comes to an end.

The limits are far beyond what one answer holds. Where `max_tokens` is the narrower limit, the engine writes the
shortest ending in time (`avp_agents.answer.grammar`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_STRING_LENGTH = 8192
"""Characters of a string whose schema has no ``maxLength``, ``pattern``, ``format``, ``enum`` or ``const``."""

MAX_ARRAY_ITEMS = 256
"""Items of an array whose schema has no ``maxItems``."""

MAX_INTEGER = 2**62
"""Largest magnitude of an integer whose schema has no bound in that direction."""

_SCHEMAS = ("items", "additionalProperties", "contains", "if", "then", "else", "not")
_LISTS_OF_SCHEMAS = ("prefixItems", "anyOf", "oneOf")
_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_ENDS_STRING = ("maxLength", "pattern", "format", "enum", "const")
_COMPOSED = ("allOf", "anyOf", "oneOf", "$ref")


def bounded_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with limits on strings, arrays and integers, and without properties that it does not name.

    What the schema limits itself stays as it is; so does an object that names no properties or asks for others.
    """
    return _bounded(schema, closed=True)


def _bounded(schema: Any, *, closed: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    bounded: dict[str, Any] = dict(schema)
    for key in _SCHEMAS:
        if key in bounded:
            bounded[key] = _bounded(bounded[key], closed=closed)
    for key in _LISTS_OF_SCHEMAS:
        if isinstance(bounded.get(key), list):
            bounded[key] = [_bounded(part, closed=closed) for part in bounded[key]]
    for key in _MAPS_OF_SCHEMAS:
        if isinstance(bounded.get(key), Mapping):
            bounded[key] = {name: _bounded(part, closed=closed) for name, part in bounded[key].items()}
    if isinstance(bounded.get("allOf"), list):
        # each part alone would refuse what the others name
        bounded["allOf"] = [_bounded(part, closed=False) for part in bounded["allOf"]]
    return bounded | _limits(bounded, closed)


def _limits(schema: Mapping[str, Any], closed: bool) -> dict[str, Any]:
    given = schema.get("type")
    types = given if isinstance(given, list) else [given]
    limits: dict[str, Any] = {}
    if "string" in types and not any(key in schema for key in _ENDS_STRING):
        limits["maxLength"] = max(MAX_STRING_LENGTH, schema.get("minLength", 0))
    if "array" in types and "maxItems" not in schema:
        limits["maxItems"] = max(MAX_ARRAY_ITEMS, schema.get("minItems", 0))
    if "integer" in types and "enum" not in schema and "const" not in schema:
        limits |= _integer_limits(schema)
    if closed and "properties" in schema and not any(key in schema for key in (*_COMPOSED, "patternProperties")):
        limits["additionalProperties"] = schema.get("additionalProperties", False)
    return limits


def _integer_limits(schema: Mapping[str, Any]) -> dict[str, Any]:
    limits = {}
    if "minimum" not in schema and "exclusiveMinimum" not in schema:
        upper = schema.get("maximum", schema.get("exclusiveMaximum", 0))
        limits["minimum"] = min(-MAX_INTEGER, int(upper) - 1)
    if "maximum" not in schema and "exclusiveMaximum" not in schema:
        lower = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        limits["maximum"] = max(MAX_INTEGER, int(lower) + 1)
    return limits
