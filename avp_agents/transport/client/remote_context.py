"""Contexts that stay on a server. Their token ids are known here; latent values are fetched when somebody looks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from avp_agents.context import Context, LatentSegment, Readout, Segment, leaves
from avp_agents.errors import TransportError
from avp_agents.transport.wire import ContextDescription, LatentsDescription, segment_from_json

if TYPE_CHECKING:
    import torch

Fetch = Callable[[], Context]
"""Gets the context with all its values."""


@dataclass(frozen=True, eq=False)
class RemoteContext(Context):
    """A context that stays on a server.

    Attributes:
        server: Tag of the namespace that it is in.
        reference: Id of a handle that stands for it there.
        kv_bytes: Bytes of its KV-cache when it was last heard of; None where it had none.
    """

    server: str = ""
    reference: str = ""
    kv_bytes: int | None = field(default=None, compare=False)


class _Values:
    """The values of one remote context, fetched at the first use. Thread-safe."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch, self._lock = fetch, threading.Lock()
        self._context: Context | None = None

    def latents(self, number: int) -> torch.Tensor:
        """The values of its n-th run of latent steps."""
        runs = [segment for segment in leaves(self.context.lineage) if isinstance(segment, LatentSegment)]
        if number >= len(runs):
            raise TransportError("The server sent another context than it had described.")
        return runs[number].embeddings

    @property
    def readout(self) -> Readout:
        """Its readout."""
        readout = self.context.readout
        if readout is None:
            raise TransportError("The server sent a context without the readout that it had described.")
        return readout

    @property
    def context(self) -> Context:
        """All of it."""
        with self._lock:
            if self._context is None:
                self._context = self._fetch()
            return self._context


class RemoteLatents(LatentSegment):
    """Latent steps whose values are on a server until `embeddings` is asked for."""

    def __init__(self, described: LatentsDescription, values: _Values, number: int) -> None:
        for name, value in (("recipe", described.recipe), ("origin", described.origin), ("_described", described)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_load", lambda: values.latents(number))

    @property
    def embeddings(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[steps, hidden]``; the first look fetches them."""
        return self.__dict__["_load"]()

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings, as the server says."""
        return self.__dict__["_described"].nbytes

    def __len__(self) -> int:
        return self.__dict__["_described"].steps


class RemoteReadout(Readout):
    """A readout whose values are on a server until they are asked for."""

    def __init__(self, size: int, values: _Values) -> None:
        object.__setattr__(self, "_size", size)
        object.__setattr__(self, "_values", values)

    @property
    def hidden(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[hidden]``; the first look fetches it."""
        return self.__dict__["_values"].readout.hidden

    @property
    def token_ids(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[k]`` int64; the first look fetches them."""
        return self.__dict__["_values"].readout.token_ids

    @property
    def probabilities(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``[k]`` float32; the first look fetches them."""
        return self.__dict__["_values"].readout.probabilities

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors, as the server says."""
        return self.__dict__["_size"]


def remote_context(
    described: ContextDescription, server: str, known: Sequence[RemoteContext], fetch: Fetch
) -> RemoteContext:
    """The context that a server described.

    Args:
        described: What it said.
        server: Tag of its namespace.
        known: The contexts that the request named.
        fetch: Gets all values.

    Raises:
        TransportError: The description makes no sense.
    """
    values = _Values(fetch)
    shared = _shared_segments(described, known)
    latents = sum(isinstance(segment, LatentSegment) for segment in leaves(shared))

    def make_latents(told: LatentsDescription) -> LatentSegment:
        nonlocal latents
        latents += 1
        return RemoteLatents(told, values, latents - 1)

    own = tuple(segment_from_json(segment, make_latents) for segment in described.segments)
    context = RemoteContext(
        described.fingerprint,
        described.dtype,
        (*shared, *own),
        RemoteReadout(described.readout_bytes, values) if described.readout_bytes else None,
        server=server,
        reference=described.handle.id,
        kv_bytes=described.kv_bytes,
    )
    context.attach(usage=described.usage, handoff=described.handoff)
    return context


def _shared_segments(described: ContextDescription, known: Sequence[RemoteContext]) -> tuple[Segment, ...]:
    if described.base is None:
        return ()
    base = next((context for context in known if context.reference == described.base), None)
    if base is None or not 0 <= described.base_segments <= len(base.lineage):
        raise TransportError("The server described a context by one that it was not told of.")
    return base.lineage[: described.base_segments]
