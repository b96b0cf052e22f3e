"""What a server says of itself when a client greets it."""

from __future__ import annotations

from dataclasses import dataclass

from avp_agents.answer.tool_format import ToolFormat
from avp_agents.protocol.handshake import Hello
from avp_agents.transport.json_fields import Fields
from avp_agents.transport.wire import tool_format_from_json


@dataclass(frozen=True)
class ServerInfo:
    """What a server said of itself.

    Attributes:
        hello: Its side of the handshake.
        model: The name of its model.
        context_window: Positions the model supports.
        namespace: Name of the namespace that the token opens.
        tag: What tells that namespace from others of the same name.
        tool_format: How the model writes tool calls.
    """

    hello: Hello
    model: str
    context_window: int
    namespace: str
    tag: str
    tool_format: ToolFormat

    @classmethod
    def from_json(cls, data: object) -> ServerInfo:
        """Read a server's answer.

        Raises:
            AvpError: It makes no sense.
        """
        fields = Fields(data, "The server's answer")
        namespace = Fields(fields.require("namespace", dict), "The namespace")
        return cls(
            hello=Hello.from_wire(fields.require("hello", dict)),
            model=fields.require("model", str),
            context_window=fields.require("context_window", int),
            namespace=namespace.require("name", str),
            tag=namespace.require("tag", str),
            tool_format=tool_format_from_json(fields.require("tool_format", dict)),
        )
