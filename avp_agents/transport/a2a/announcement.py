"""What an agent says of itself: which model it runs, which modes it can do, and how much it takes.

It stands in the agent's card (the extension's ``params``), and in the metadata of a message whose sender wants to be
answered with a context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from a2a.types import AgentCard, AgentExtension, Message

from avp_agents.errors import HandshakeError
from avp_agents.protocol.handshake import Hello
from avp_agents.transport.a2a.names import EXTENSION_URI
from avp_agents.transport.a2a.structs import from_protobuf, to_struct
from avp_agents.transport.json_fields import Fields
from avp_agents.transport.wire import Json

if TYPE_CHECKING:
    from avp_agents.engine.latent_engine import LatentEngine

VERSION = 1
RAW_BYTES = 2 * 2**20
"""Most bytes of ``raw`` payloads of one message: they travel as base64 in JSON, and through it several times."""


@dataclass(frozen=True)
class Announcement:
    """What one agent says of itself.

    Attributes:
        hello: Its side of the handshake: fingerprint, dtype, vocabulary, modes, prefill speed.
        raw_bytes: Most bytes of ``raw`` payloads that it takes in one message.
        url_bytes: Largest payload that it fetches from a URL; 0 where it fetches none.
    """

    hello: Hello
    raw_bytes: int = RAW_BYTES
    url_bytes: int = 0

    def to_params(self) -> Json:
        """As JSON."""
        return {
            "v": VERSION,
            "hello": self.hello.to_wire(),
            "raw_bytes": self.raw_bytes,
            "url_bytes": self.url_bytes,
        }

    @classmethod
    def from_params(cls, data: object) -> Announcement:
        """Read what another agent says; untrusted.

        Raises:
            AvpError: It makes no sense, or is of a version that this release does not know.
        """
        fields = Fields(data, "The announcement")
        if (version := fields.require("v", int)) != VERSION:
            raise HandshakeError(f"Version {version} of {EXTENSION_URI} is unknown; this release speaks {VERSION}.")
        return cls(
            hello=Hello.from_wire(fields.require("hello", dict)),
            raw_bytes=fields.get("raw_bytes", int, 0),
            url_bytes=fields.get("url_bytes", int, 0),
        )


def announcement_of_engine(engine: LatentEngine, *, url_bytes: int = 0) -> Announcement:
    """What an agent that runs this engine says of itself."""
    return Announcement(engine.crossing.hello(), url_bytes=url_bytes)


def announce(card: AgentCard, engine: LatentEngine, *, url_bytes: int = 0) -> None:
    """Add the extension to an agent's card. Agents that do not know it go on as before: it is not required.

    Args:
        card: Changed in place.
        engine: What the agent runs; its weights are loaded.
        url_bytes: Largest payload that the agent fetches from a URL, as its `UrlPolicy` says; 0 where it fetches none.
    """
    params = announcement_of_engine(engine, url_bytes=url_bytes).to_params()
    card.capabilities.extensions.append(
        AgentExtension(
            uri=EXTENSION_URI,
            description="Takes latent contexts: lineage, KV-cache or thought of a language model, beside text.",
            required=False,
            params=to_struct(params),
        )
    )


def introduce(message: Message, engine: LatentEngine, *, url_bytes: int = 0) -> None:
    """Say in a message what its sender runs, so that it can be answered with a context.

    Args:
        message: Changed in place.
        engine: What the sender runs.
        url_bytes: As in `announce`.
    """
    params = announcement_of_engine(engine, url_bytes=url_bytes).to_params()
    if EXTENSION_URI not in message.extensions:
        message.extensions.append(EXTENSION_URI)
    message.metadata.update({EXTENSION_URI: params})


def announcement_of(card_or_message: AgentCard | Message) -> Announcement | None:
    """What a card or a message says of the agent behind it; None where it does not speak the extension.

    Raises:
        AvpError: It says something that makes no sense, or is of an unknown version.
    """
    if isinstance(card_or_message, Message):
        said = from_protobuf(card_or_message.metadata).get(EXTENSION_URI)
        return None if said is None else Announcement.from_params(said)
    for extension in card_or_message.capabilities.extensions:
        if extension.uri == EXTENSION_URI:
            return Announcement.from_params(from_protobuf(extension.params))
    return None
