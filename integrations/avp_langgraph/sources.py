"""What a thought was thought on, in a few bytes beside its handle.

A handle in the `contexts` channel stands alone: no message says how its context was made. If that context is lost, it
can still be made again where a later prompt begins with the messages it was thought on. The note says which those were
(a digest) and how they were thought on.

    "soft:256:20:9f86d081884c"      method, k, latent steps, digest
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import cast, get_args

from avp_agents.context import Context, LatentMethod, LatentRecipe
from avp_agents.prompt.chat_messages import Message

_NOTE = re.compile(r"(soft|ridge|rescale):(\d{1,6}|):(\d{1,6}):([0-9a-f]{12})")


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
