"""Contexts, prompts and answers as JSON, read and written by both sides.

A context stays on the server. What travels is a description: its reference (a handle), its token ids, how its latent
steps were made, and what it cost; latent values and KV-caches travel only when they are asked for, as frames. Where a
context goes on from one that the client knows, only what comes behind that is described.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast, get_args

from avp_agents.answer.generation import Chunk, Generation, TokenLogprob
from avp_agents.answer.tool_format import Markup, ToolFormat
from avp_agents.context import (
    Context,
    LatentRecipe,
    LatentSegment,
    Segment,
    SplicedSegment,
    TokenSegment,
)
from avp_agents.errors import PromptError, TransportError
from avp_agents.handle import ContextHandle
from avp_agents.prompt.chat_messages import Prompt
from avp_agents.transport.json_fields import Fields
from avp_agents.usage import Handoff, HandoffMode, Usage

Json = dict[str, Any]


@dataclass(frozen=True)
class LatentsDescription:
    """What a client is told of a run of latent steps: everything but the values."""

    recipe: LatentRecipe
    steps: int
    nbytes: int
    origin: str | None


MakeLatents = Callable[[LatentsDescription], LatentSegment]
"""Makes a latent segment whose values are on the server."""

API = "/avp/v1"
"""Where the engine's own endpoints begin."""

REQUEST_ID_HEADER = "x-avp-request"
"""Names a request, so that ``DELETE /avp/v1/requests/<name>`` can cancel it."""

OFFSET_HEADER = "upload-offset"
"""Bytes of an upload that have arrived, and where a further piece begins."""


def prompt_to_json(prompt: Prompt, reference: Callable[[Context], str]) -> Any:
    """A prompt, with each message's context replaced by its reference.

    Raises:
        PromptError: It is not a string or a list of messages.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        raise PromptError(f"A prompt is a string or a list of chat messages, not {type(prompt).__name__}.")
    return [_message_to_json(message, reference) for message in prompt]


def _message_to_json(message: Any, reference: Callable[[Context], str]) -> Any:
    if not isinstance(message, Mapping):
        raise PromptError(f"A message is a {type(message).__name__}; pass a dict with 'role' and 'content'.")
    context = message.get("context")
    return dict(message) | ({"context": reference(context)} if isinstance(context, Context) else {})


@dataclass(frozen=True)
class ContextDescription:
    """What a client is told about a context.

    Attributes:
        handle: Its reference.
        base: Reference of the context that it goes on from, if the client named one.
        base_segments: Segments that it shares with that.
        segments: The other segments, as JSON.
        readout_bytes: Bytes of the readout; 0 where there is none.
        kv_bytes: Bytes of its KV-cache; None where there is none at the moment.
        prefix_ids: Handle ids of the lineage's prefixes in the scope that was asked about, shortest first.
    """

    handle: ContextHandle
    fingerprint: str
    dtype: str
    base: str | None
    base_segments: int
    segments: tuple[Json, ...]
    readout_bytes: int
    kv_bytes: int | None
    usage: Usage | None
    handoff: Handoff | None
    prefix_ids: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """As JSON data."""
        return {
            "handle": self.handle.to_state(),
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            "base": self.base,
            "base_segments": self.base_segments,
            "segments": list(self.segments),
            "readout_bytes": self.readout_bytes,
            "kv_bytes": self.kv_bytes,
            "usage": asdict(self.usage) if self.usage else None,
            "handoff": self.handoff.to_metadata() if self.handoff else None,
            "prefix_ids": list(self.prefix_ids),
        }

    @classmethod
    def from_json(cls, data: object) -> ContextDescription:
        """Read what a server answered.

        Raises:
            AvpError: It makes no sense.
        """
        fields = Fields(data, "A context's description")
        usage, handoff = fields.get("usage", dict), fields.get("handoff", dict)
        return cls(
            handle=ContextHandle.from_state(fields.require("handle", dict)),
            fingerprint=fields.require("fingerprint", str),
            dtype=fields.require("dtype", str),
            base=fields.get("base", str),
            base_segments=fields.get("base_segments", int, 0),
            segments=tuple(fields.require("segments", list)),
            readout_bytes=fields.get("readout_bytes", int, 0),
            kv_bytes=fields.get("kv_bytes", int),
            usage=usage_from_json(usage) if usage is not None else None,
            handoff=handoff_from_json(handoff) if handoff is not None else None,
            prefix_ids=tuple(str(id_) for id_ in fields.get("prefix_ids", list, [])),
        )


def describe(
    context: Context, handle: ContextHandle, known: Mapping[str, Context], prefix_ids: Iterable[str] = ()
) -> ContextDescription:
    """Describe a context to a client that knows some others.

    Args:
        context: Which one.
        handle: Its reference.
        known: The contexts that the client named, by reference.
        prefix_ids: See `ContextDescription`.
    """
    extended = [(len(other.lineage), reference) for reference, other in known.items() if context.extends(other)]
    shared, base = max(extended, default=(0, None))
    kv = context.kv
    return ContextDescription(
        handle=handle,
        fingerprint=context.fingerprint,
        dtype=context.dtype,
        base=base,
        base_segments=shared,
        segments=tuple(_segment_to_json(segment) for segment in context.lineage[shared:]),
        readout_bytes=context.readout.nbytes if context.readout is not None else 0,
        kv_bytes=kv.nbytes if kv is not None else None,
        usage=context.usage,
        handoff=context.handoff,
        prefix_ids=tuple(prefix_ids),
    )


def _segment_to_json(segment: Segment) -> Json:
    match segment:
        case TokenSegment():
            return {"tokens": list(segment.token_ids)}
        case LatentSegment():
            return {
                "latent": asdict(segment.recipe),
                "steps": len(segment),
                "bytes": segment.nbytes,
                "origin": segment.origin,
            }
        case SplicedSegment():
            return {"spliced": [_segment_to_json(part) for part in segment.segments], "prefix": segment.prefix}


def segment_from_json(data: object, make_latents: MakeLatents) -> Segment:
    """A segment of a description.

    Raises:
        TransportError: It makes no sense.
    """
    if not isinstance(data, dict):
        raise TransportError("The server described a segment that is not an object.")
    tokens, latent, spliced = data.get("tokens"), data.get("latent"), data.get("spliced")
    if isinstance(tokens, list) and all(type(token) is int for token in tokens):
        return TokenSegment(tuple(tokens))
    steps, size, prefix, origin = (data.get(name) for name in ("steps", "bytes", "prefix", "origin"))
    if isinstance(latent, dict) and type(steps) is int and type(size) is int and isinstance(origin, str | None):
        return make_latents(LatentsDescription(_recipe_from_json(latent), steps, size, origin))
    if isinstance(spliced, list) and type(prefix) is int:
        return SplicedSegment(tuple(segment_from_json(part, make_latents) for part in spliced), prefix)
    raise TransportError("The server described a segment of an unknown kind; client and server may differ in version.")


def _recipe_from_json(data: Json) -> LatentRecipe:
    try:
        return LatentRecipe(**data)
    except TypeError as error:
        raise TransportError("The server described latent steps in an unknown way.") from error


def usage_from_json(data: Json) -> Usage:
    """A `Usage` that was sent as JSON.

    Raises:
        TransportError: It makes no sense.
    """
    try:
        return Usage(**data)
    except TypeError as error:
        raise TransportError("The server reported usage in an unknown way.") from error


def handoff_from_json(data: Json) -> Handoff:
    """A `Handoff` that was sent as JSON.

    Raises:
        TransportError: It makes no sense.
    """
    if data.get("mode") not in get_args(HandoffMode):
        raise TransportError("The server reported a handoff in an unknown mode.")
    try:
        read: Json = data | {"notes": tuple(data.get("notes", ()))}
        return Handoff(**read)
    except TypeError as error:
        raise TransportError("The server reported a handoff in an unknown way.") from error


def chunk_to_json(chunk: Chunk) -> Json:
    """A piece of an answer, without the answer that the last one carries."""
    return {
        "text": chunk.text,
        "reasoning": chunk.reasoning,
        "token_ids": list(chunk.token_ids),
        "logprobs": [_logprob_to_json(logprob) for logprob in chunk.logprobs],
    }


def chunk_from_json(data: object, generation: Generation | None = None) -> Chunk:
    """A piece of an answer.

    Raises:
        AvpError: It makes no sense.
    """
    fields = Fields(data, "A chunk")
    return Chunk(
        text=fields.get("text", str, ""),
        token_ids=tuple(fields.get("token_ids", list, [])),
        generation=generation,
        logprobs=tuple(_logprob_from_json(logprob) for logprob in fields.get("logprobs", list, [])),
        reasoning=fields.get("reasoning", str, ""),
    )


def generation_to_json(generation: Generation, description: ContextDescription) -> Json:
    """An answer; `description` is that of its context."""
    return {
        "text": generation.text,
        "reasoning": generation.reasoning,
        "token_ids": list(generation.token_ids),
        "context": description.to_json(),
        "usage": asdict(generation.usage),
        "handoff": generation.handoff.to_metadata(),
        "finish_reason": generation.finish_reason,
        "logprobs": None if generation.logprobs is None else [_logprob_to_json(p) for p in generation.logprobs],
    }


def generation_from_json(data: object, context: Callable[[object], Context]) -> Generation:
    """An answer; `context` makes its context of the description.

    Raises:
        AvpError: It makes no sense.
    """
    fields = Fields(data, "An answer")
    logprobs = fields.get("logprobs", list)
    return Generation(
        text=fields.require("text", str),
        token_ids=tuple(fields.require("token_ids", list)),
        context=context(fields.require("context", dict)),
        usage=usage_from_json(fields.require("usage", dict)),
        handoff=handoff_from_json(fields.require("handoff", dict)),
        finish_reason=cast("Any", fields.require("finish_reason", str)),
        logprobs=None if logprobs is None else tuple(_logprob_from_json(logprob) for logprob in logprobs),
        reasoning=fields.get("reasoning", str, ""),
    )


def _logprob_to_json(logprob: TokenLogprob) -> Json:
    return asdict(logprob)


def _logprob_from_json(data: object) -> TokenLogprob:
    fields = Fields(data, "A log-probability")
    top = tuple((int(token_id), float(value)) for token_id, value in fields.get("top", list, []))
    return TokenLogprob(
        fields.require("token_id", int), fields.require("text", str), fields.require("logprob", float), top
    )


def tool_format_from_json(data: object) -> ToolFormat:
    """A `ToolFormat` that was sent as its fields.

    Raises:
        AvpError: It makes no sense.
    """
    fields = Fields(data, "A tool format")
    values: Json = {name: _markup(fields.get(name, dict)) for name in ("begin", "middle", "end", "between")}
    values |= {name: fields.get(name, str) for name in ("joint", "head", "rest", "text")}
    read = ToolFormat(**values, is_native=fields.require("is_native", bool))
    fields.end()
    return read


def _markup(data: object) -> Markup | None:
    if data is None:
        return None
    fields = Fields(data, "A markup")
    return Markup(fields.require("text", str), fields.require("lark", str))


def frame_key(token: str | None) -> bytes:
    """The key of frames between a client and a server: both know the token, nobody else does.

    Args:
        token: None on a server that takes requests without one; frames then are only protected against accidents.

    Returns:
        32 bytes.
    """
    return hashlib.blake2b((token or "").encode(), digest_size=32, person=b"avp-frame-token").digest()
