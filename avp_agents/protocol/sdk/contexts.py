"""Contexts of an engine's as SDK messages, and the other way round.

An SDK message carries keys and values but no lineage: neither token ids nor latent embeddings. The receiver has to say
which ids the sender fed, in which order with how many latent steps; it has them where it holds the same messages. The
embeddings are found again from the message itself: the engine runs the same latent steps on top of the received keys
and values, which costs one forward pass per step and no prefill. The first of those steps must produce the keys that
were received, which other weights, other ids or another step function do not. What comes out is an ordinary context: it
can be stored, extended and replayed, and its KV-cache is the one that was received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from avp_agents.context import Context, LatentRecipe, LatentSegment, Readout, Segment, TokenSegment
from avp_agents.errors import ConfigurationError, FingerprintMismatchError, ForeignMessageError
from avp_agents.kv_cache import HostKv
from avp_agents.protocol.limits import Limits
from avp_agents.protocol.sdk.identity import SdkIdentity
from avp_agents.protocol.sdk.message import SDK_LIMITS, SdkMessage
from avp_agents.protocol.sdk.tensors import kv_message, kv_of

_MOST_DEVIATION = 0.3
"""Of the first latent step's keys, relative; other weights or ids deviate by more than 1, rounding by less than 0.1."""


class Thinker(Protocol):
    """What of an engine is needed to find latent embeddings again."""

    @property
    def fingerprint(self) -> str:
        """Digest of weights, architecture and tokenizer."""
        ...

    @property
    def dtype(self) -> str:
        """``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        ...

    def think(self, prompt: Any, *, steps: int = 20, context: Context | None = None, **options: Any) -> Context:
        """Prefill the prompt on top of `context` and run latent steps."""
        ...


def context_message(context: Context, identity: SdkIdentity, *, agent: str = "", session: str = "") -> SdkMessage:
    """A context's KV-cache as the SDK's ``AVPContext.from_bytes`` reads it. Lineage and readout stay behind.

    Args:
        context: A context whose KV-cache holds all of its positions.
        identity: The model, as the SDK describes it.
        agent: Who sends it.
        session: The session's id, if there is one.

    Raises:
        ConfigurationError: The KV-cache is missing or lacks positions, or the SDK's format cannot hold it.
        ForeignMessageError: It is not a KV-cache of that model.
        KvMemoryError: It was evicted meanwhile.
    """
    kv = context.kv
    if kv is None or kv.length != len(context):
        held = 0 if kv is None else kv.length
        raise ConfigurationError(
            f"The KV-cache holds {held} of {len(context)} positions, and the SDK cannot replay the others. Call "
            "engine.replay(context) first."
        )
    host = kv.to_host()
    heads, _, width = host.layers[0][0].shape
    expected = (identity.num_layers, identity.num_kv_heads, identity.head_dim)
    if (len(host.layers), heads, width) != expected:
        raise ForeignMessageError(
            f"The KV-cache has {len(host.layers)} layers of {heads} heads of width {width}, "
            f"but {identity.model_family} has {expected[0]} of {expected[1]} of width {expected[2]}."
        )
    return replace(
        kv_message(host),
        hidden_dim=identity.hidden_dim,
        model_id=identity.model_id,
        session_id=session,
        source_agent_id=agent,
        extra={
            "model_hash": identity.model_hash,
            "model_family": identity.model_family,
            "num_steps": str(context.latent_steps),
        },
    )


def adopt_context(
    engine: Thinker, message: SdkMessage, fed: Sequence[Sequence[int] | int], *, limits: Limits = SDK_LIMITS
) -> Context:
    """A context of the engine's own, made from a message and what its sender fed to the model.

    Args:
        engine: Runs the sender's model in the dtype of the message's KV-cache.
        message: A KV-cache.
        fed: What stands at the KV-cache's positions, in order: token ids, or a number of latent steps. After the SDK's
            ``think(prompt, steps=20)`` that is ``[ids, 20]``.
        limits: What is accepted.

    Raises:
        ForeignMessageError: The message is malformed, or `fed` has not as many positions as its KV-cache.
        ConfigurationError: `fed` does not begin with token ids.
        FingerprintMismatchError: The KV-cache has another dtype than the engine, or was not made by this model from
            these ids.
        KvMemoryError, EngineBusyError, RequestTimeoutError, NumericalError: As for `think`.

    Example:
        >>> message = decode_message(data)
        >>> context = adopt_context(engine, message, [prompt_ids, 20])
        >>> engine.generate("Solve it.", context=context).text
    """
    received = kv_of(message, limits=limits)
    runs = [run if isinstance(run, int) else TokenSegment(tuple(run)) for run in fed]
    positions = sum(run if isinstance(run, int) else len(run) for run in runs)
    if not runs or not isinstance(runs[0], TokenSegment) or not len(runs[0]):
        raise ConfigurationError("What was fed begins with token ids.")
    if positions != received.length:
        raise ForeignMessageError(
            f"The message's KV-cache holds {received.length} positions, but {positions} are said to have been fed."
        )
    dtype = str(received.layers[0][0].dtype).removeprefix("torch.")
    if dtype != engine.dtype:
        raise FingerprintMismatchError(f"The KV-cache is {dtype}, the engine runs {engine.dtype}; give both one dtype.")
    lineage: tuple[Segment, ...] = ()
    readout: Readout | None = None
    for run in runs:
        if isinstance(run, TokenSegment):
            lineage, readout = (*lineage, run), None
        else:
            segment, readout = _think_again(engine, lineage, run, received, message.hidden_dim)
            lineage = (*lineage, segment)
    context = Context(engine.fingerprint, engine.dtype, lineage, readout)
    context.attach(kv=received)
    return context


def _think_again(
    engine: Thinker, lineage: tuple[Segment, ...], steps: int, received: HostKv, width: int
) -> tuple[LatentSegment, Readout | None]:
    """The latent steps that the sender ran behind `lineage`, and what the model was about to say after them."""
    import torch

    floats = getattr(torch, engine.dtype)
    # a run of no latent steps keeps the sender's turn open: the engine appends nothing to it before it thinks
    recipe = LatentRecipe(method="soft", k=None, temperature=1.0, renormalise=False, steps=0)
    opened = LatentSegment(torch.empty(0, width, dtype=floats), recipe)
    base = Context(engine.fingerprint, engine.dtype, (*lineage, opened))
    start = len(base)
    base.attach(kv=received.to_host(0, start))
    thought = engine.think([], steps=steps, context=base, k=None)
    segment = thought.lineage[-1]
    assert isinstance(segment, LatentSegment)
    if len(segment) != steps or thought.kv is None:
        raise ForeignMessageError(f"The engine ran {len(segment)} of the {steps} latent steps.")
    _check_first_step(thought.kv.to_host(start, start + 1), received.to_host(start, start + 1))
    return segment, thought.readout


def _check_first_step(ours: HostKv, received: HostKv) -> None:
    shapes = [[tensor.shape for pair in kv.layers for tensor in pair] for kv in (ours, received)]
    if shapes[0] != shapes[1]:
        raise FingerprintMismatchError("The KV-cache has other layers than the engine's model.")
    difference = sum((a[0].float() - b[0].float()).square().sum().item() for a, b in _layers(ours, received))
    size = sum(b[0].float().square().sum().item() for _, b in _layers(ours, received))
    if not difference <= _MOST_DEVIATION**2 * size:
        raise FingerprintMismatchError(
            "The KV-cache does not come from this model and these ids: its first latent step is another. Check the "
            "model's weights, and the ids that the sender fed."
        )


def _layers(ours: HostKv, received: HostKv) -> zip[Any]:
    return zip(ours.layers, received.layers, strict=True)
