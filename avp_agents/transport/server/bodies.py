"""Request bodies: read in pieces, never more than allowed."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from avp_agents.errors import ConfigurationError, LimitExceededError
from avp_agents.transport.json_fields import Fields, parse_json
from avp_agents.transport.problems import Refusal
from avp_agents.transport.server.gate import ClientGone


async def read_fields(request: Request, most: int) -> Fields:
    """The JSON object that a request carries.

    Args:
        request: With a body.
        most: Bytes allowed.

    Raises:
        Refusal: 413, it is larger. A body that announces its length is refused before it is read.
        ConfigurationError: It is not a JSON object.
        ClientGone: The client left before its end.
    """
    declared = content_length(request)
    if declared is not None and declared > most:
        raise too_large(most)
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise too_large(most)
    except ClientDisconnect as error:
        raise ClientGone from error
    return Fields(parse_json(bytes(body)))


def content_length(request: Request) -> int | None:
    """What the request says about its body's length.

    Raises:
        ConfigurationError: It is no number.
    """
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ConfigurationError("The header Content-Length is not a number of bytes.")
    return int(text)


def too_large(most: int) -> Refusal:
    """A body over its limit."""
    return Refusal(
        413, LimitExceededError(f"The body is larger than the {most} bytes allowed."), headers={"connection": "close"}
    )
