"""Messages as an agent's turn reads them, and what they claim: untrusted, like everything that comes from a state.

A message may carry a handle, and then stands for a context. It may say what its content was (a digest, so that an edit
is noticed), and how the latent steps that it stands for were made, so that they can be made again.

A handle that stands alone, as in a graph's state, has that in its note (`ContextHandle.source`): how its thought was
made, and a digest of the messages that it was thought on.

    "soft:256:20:9f86d081884c"      method, k, latent steps, digest
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from avp_agents.context import Context, LatentMethod, LatentRecipe
from avp_agents.prompt.chat_messages import Message

_NOTE = re.compile(r"(soft|ridge|rescale):(\d{1,6}|):(\d{1,6}):([0-9a-f]{12})")


@dataclass(frozen=True)
class Scope:
    """Where handles are minted and honoured.

    Attributes:
        minted: The scope that new handles are put under.
        honoured: The scope that a handle must have been minted for; None takes any of the namespace.
        agent: Who takes the turn, for people; may be empty.
    """

    minted: str
    honoured: str | None
    agent: str = ""


@dataclass(frozen=True)
class HandedMessage:
    """One message, read.

    Attributes:
        message: What the engine renders when no context stands for this turn: ``role``, ``content``, and where the
            message has them ``name``, ``tool_calls``, ``tool_call_id`` and ``reasoning_content``.
        handle: The handle of the context that the message claims to stand for; None where it claims none. Untrusted,
            like the recipe: state can be edited.
        is_edited: The content is no longer what it was when the context was made; the content counts.
        is_thought: It stands for latent steps. Its content is a line for people, which is never rendered to a model and
            not in `message`.
        recipe: How those steps were made; None where that is not known.
    """

    message: Mapping[str, Any]
    handle: object = None
    is_edited: bool = False
    is_thought: bool = False
    recipe: LatentRecipe | None = field(default=None, compare=False)


def content_digest(text: str, calls: Iterable[tuple[str, Any]] = ()) -> str:
    """16 hex digits that tell whether a message's text, or the name or arguments of a tool call in it, were edited."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8)
    for call in calls:
        digest.update(json.dumps(call, sort_keys=True, default=str).encode(errors="surrogatepass"))
    return digest.hexdigest()


def read_recipe(data: object) -> LatentRecipe | None:
    """A recipe out of a message's metadata, None if it is not well formed."""
    if not isinstance(data, Mapping):
        return None
    values = cast("Mapping[str, Any]", data)
    method, k, steps, renormalise = (values.get(name) for name in ("method", "k", "steps", "renormalise"))
    temperature, cosine, entropy = (values.get(name) for name in ("temperature", "stop_cosine", "stop_entropy"))
    well_formed = (
        method in get_args(LatentMethod)
        and type(steps) is int
        and steps >= 1
        and type(renormalise) is bool
        and (k is None or type(k) is int)
        and isinstance(temperature, int | float)
        and all(stop is None or isinstance(stop, int | float) for stop in (cosine, entropy))
    )
    if not well_formed:
        return None
    return LatentRecipe(
        method=cast("LatentMethod", method),
        k=k,
        temperature=float(cast("float", temperature)),
        renormalise=cast("bool", renormalise),
        steps=cast("int", steps),
        stop_cosine=cosine,
        stop_entropy=entropy,
    )


def source_note(prompt: Sequence[Message], recipe: LatentRecipe) -> str:
    """The note on a thought that was thought on `prompt` alone; empty where its options are not the usual ones."""
    if recipe.method not in get_args(LatentMethod):
        return ""
    if recipe != _usual_recipe(cast("LatentMethod", recipe.method), recipe.k, recipe.steps):
        return ""
    k = "" if recipe.k is None else recipe.k
    return f"{recipe.method}:{k}:{recipe.steps}:{_digests(prompt)[-1]}"


def find_source(source: str, prompt: Sequence[Message]) -> tuple[list[Message], LatentRecipe | None]:
    """The messages at the beginning of `prompt` that a handle's context was thought on, and how; else none, and None.

    Args:
        source: The handle's note. Untrusted: one that was tampered with is followed only within this prompt.
        prompt: The engine's messages.
    """
    note = _NOTE.fullmatch(source)
    if note is None:
        return [], None
    method, k, steps, digest = note.groups()
    digests = _digests(prompt)
    if int(steps) < 1 or digest not in digests:
        return [], None
    recipe = _usual_recipe(cast("LatentMethod", method), int(k) if k else None, int(steps))
    return list(prompt[: digests.index(digest) + 1]), recipe


def _usual_recipe(method: LatentMethod, k: int | None, steps: int) -> LatentRecipe:
    """How an engine thinks where it is told method, k and steps only."""
    return LatentRecipe(method, k, temperature=1.0, renormalise=method != "soft", steps=steps)


def _digests(prompt: Sequence[Message]) -> list[str]:
    """One for each beginning of the prompt, 12 hex digits."""
    digest, digests = hashlib.blake2b(digest_size=6), []
    for message in prompt:
        digest.update(_canonical(message))
        digests.append(digest.hexdigest())
    return digests


def _canonical(message: Message) -> bytes:
    """What of a message a model gets to see."""
    context = message.get("context")
    if isinstance(context, Context):
        return f"context {context.recipe_id}\n".encode()
    return json.dumps(dict(message), sort_keys=True, default=str).encode(errors="surrogatepass") + b"\n"
