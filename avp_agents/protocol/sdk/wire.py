"""The metadata of an SDK message: a protocol buffer of scalar fields, read and written without a protobuf library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from avp_agents.errors import ConfigurationError, ForeignMessageError

_VARINT, _BYTES = 0, 2
_MAX_VARINT_BYTES = 10

STRINGS = {1: "session_id", 2: "source_agent_id", 3: "target_agent_id", 4: "model_id", 11: "compression", 13: "map_id"}
NUMBERS = {5: "hidden_dim", 6: "num_layers", 7: "payload_type", 8: "dtype", 10: "mode", 15: "checksum"}
_SHAPE, _EXTRA, _CHECKSUM = 9, 14, 15


def pack(fields: Mapping[str, Any]) -> bytes:
    """The fields in order of their numbers; what equals its default is left out, but for the checksum.

    Raises:
        ConfigurationError: A text is not Unicode (lone surrogates).
    """
    parts: list[bytes] = []
    for number in range(1, 16):
        if number == _SHAPE and fields["shape"]:
            parts.append(_delimited(number, b"".join(_varint(extent) for extent in fields["shape"])))
        elif number == _EXTRA:
            parts += [_delimited(number, _packed_entry(*entry)) for entry in fields["extra"].items()]
        elif text := fields.get(STRINGS.get(number, "")):
            parts.append(_delimited(number, _utf8(text)))
        elif number in NUMBERS and (fields[NUMBERS[number]] or number == _CHECKSUM):
            parts.append(_varint(number << 3 | _VARINT) + _varint(fields[NUMBERS[number]]))
    return b"".join(parts)


def _packed_entry(name: str, text: str) -> bytes:
    return _delimited(1, _utf8(name)) + _delimited(2, _utf8(text))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError("Text with lone surrogates cannot be sent.") from error


def unpack(data: memoryview) -> dict[str, Any]:
    """The fields; a string or number that is not there has its default, but the checksum then is None.

    Raises:
        ForeignMessageError: The bytes are torn, or hold a field that version 1 does not have, or a scalar twice.
    """
    fields: dict[str, Any] = dict.fromkeys(STRINGS.values(), "") | dict.fromkeys(NUMBERS.values(), 0)
    fields |= {"checksum": None, "shape": [], "extra": {}}
    seen: set[int] = set()
    for number, value in _fields(data):
        if number in seen and number not in (_SHAPE, _EXTRA):
            raise ForeignMessageError(f"The message's metadata has field {number} twice.")
        seen.add(number)
        if number == _SHAPE:
            fields["shape"] += [value] if isinstance(value, int) else list(_varints(value))
        elif number == _EXTRA and not isinstance(value, int):
            name, text = _entry(value)
            fields["extra"][name] = text
        elif number in STRINGS and not isinstance(value, int):
            fields[STRINGS[number]] = _text(value)
        elif number in NUMBERS and isinstance(value, int):
            if value >= 2**32:
                raise ForeignMessageError(f"The message's metadata has a field {number} of more than 32 bits.")
            fields[NUMBERS[number]] = value
        else:
            raise ForeignMessageError(
                f"The message's metadata has a field {number} that version 1 does not; SDKs before 0.3 wrote others."
            )
    return fields


def _entry(data: memoryview) -> tuple[str, str]:
    texts = {1: "", 2: ""}
    for number, value in _fields(data):
        if number not in texts or isinstance(value, int):
            raise ForeignMessageError("An entry of the message's extra fields is malformed.")
        texts[number] = _text(value)
    return texts[1], texts[2]


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    offset = 0
    while offset < len(data):
        tag, offset = _read_varint(data, offset)
        value, offset = _read_varint(data, offset)
        if tag & 7 == _BYTES:
            end = offset + value
            if end > len(data):
                raise ForeignMessageError("The message's metadata ends early.")
            yield tag >> 3, data[offset:end]
            offset = end
        elif tag & 7 == _VARINT:
            yield tag >> 3, value
        else:
            raise ForeignMessageError(
                f"The message's metadata has a field {tag >> 3} that version 1 does not; SDKs before 0.3 wrote others."
            )


def _varints(data: memoryview) -> Iterator[int]:
    offset = 0
    while offset < len(data):
        value, offset = _read_varint(data, offset)
        yield value


def _read_varint(data: memoryview, offset: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[offset : offset + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, offset + index + 1
    raise ForeignMessageError("The message's metadata ends within a number.")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _delimited(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _text(value: memoryview) -> str:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ForeignMessageError("The message's metadata has text that is not UTF-8.") from error
