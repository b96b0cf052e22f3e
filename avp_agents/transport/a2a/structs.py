"""JSON in protobuf's ``Struct``, which knows one kind of number only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value

from avp_agents.errors import TransportError


def to_struct(data: Mapping[str, Any]) -> Struct:
    """A JSON object as a ``Struct``."""
    return json_format.ParseDict(dict(data), Struct())


def to_value(data: Mapping[str, Any]) -> Value:
    """A JSON object as a ``Value``."""
    return json_format.ParseDict(dict(data), Value())


def from_protobuf(message: Message) -> Any:
    """The JSON that a ``Struct`` or ``Value`` holds; whole numbers are integers again.

    Raises:
        TransportError: It is nested too deeply, or holds what JSON cannot.
    """
    try:
        return _with_integers(json_format.MessageToDict(message))
    except (json_format.Error, ValueError, RecursionError) as error:
        raise TransportError(f"A part's data is not JSON: {error}.") from error


def _with_integers(data: Any) -> Any:
    if isinstance(data, float) and data.is_integer():
        return int(data)
    if isinstance(data, dict):
        return {name: _with_integers(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_with_integers(value) for value in data]
    return data
