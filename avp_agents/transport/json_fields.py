"""JSON objects from the network, field by field: each is checked, and what nobody asked for is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar, overload

from avp_agents.errors import ConfigurationError

_Value = TypeVar("_Value")
_Default = TypeVar("_Default")
_NAMES: dict[type, str] = {
    str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "an object",
}  # fmt: skip

NestingTooDeep = RecursionError
"""What `json.loads` raises for an input of ten thousand brackets."""


def parse_json(data: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ConfigurationError: It is none, or is nested too deeply.
    """
    try:
        return json.loads(data, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, NestingTooDeep) as error:
        raise ConfigurationError(f"The body is not JSON: {error}.") from error


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Fields:
    """The fields of one JSON object. Read them, then call `end`.

    Args:
        data: Untrusted.
        what: What it is, for messages.

    Raises:
        ConfigurationError: It is not an object.
    """

    def __init__(self, data: object, what: str = "The body") -> None:
        if not isinstance(data, dict):
            raise ConfigurationError(f"{what} must be a JSON object, not {type(data).__name__}.")
        self._data: Mapping[str, Any] = data
        self._what = what
        self._unread = set(data)

    def require(self, name: str, kind: type[_Value]) -> _Value:
        """A field that must be there.

        Raises:
            ConfigurationError: It is missing or of another kind.
        """
        value = self.get(name, kind, None)
        if value is None:
            raise ConfigurationError(f"{self._what} needs the field {name!r}.")
        return value

    @overload
    def get(self, name: str, kind: type[_Value], default: None = None) -> _Value | None: ...
    @overload
    def get(self, name: str, kind: type[_Value], default: _Default) -> _Value | _Default: ...
    def get(self, name: str, kind: type[Any], default: Any = None) -> Any:
        """A field, or the default where it is missing or null.

        Raises:
            ConfigurationError: It is of another kind.
        """
        value = self.anything(name)
        if value is None:
            return default
        if kind is float and type(value) is int:
            try:
                return float(value)
            except OverflowError as error:
                raise ConfigurationError(f"{name!r} is too large a number.") from error
        if type(value) is not kind:
            raise ConfigurationError(f"{name!r} must be {_NAMES[kind]}, not {type(value).__name__}.")
        return value

    def anything(self, name: str) -> Any:
        """A field of any kind; None where it is missing."""
        self._unread.discard(name)
        return self._data.get(name)

    def end(self) -> None:
        """Refuse fields that nobody read.

        Raises:
            ConfigurationError: There is one.
        """
        if self._unread:
            raise ConfigurationError(f"{self._what} has a field that is not known: {min(self._unread)[:60]!r}.")
