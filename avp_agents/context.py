"""Contexts: what one agent hands to another.

A `Context` is an immutable *lineage* (token ids and latent embeddings, in order) of one model. Its KV-cache is only a
cache of that lineage: it may be on the device, on the host, on disk or gone, and can be rebuilt by one prefill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from avp_agents.errors import ConfigurationError, NotStoredError

if TYPE_CHECKING:
    import torch

    from avp_agents.handle import ContextHandle
    from avp_agents.kv_cache import KvCache
    from avp_agents.usage import Handoff, Usage

LatentMethod = Literal["soft", "ridge", "rescale"]
"""How an engine makes latent steps."""


@dataclass(frozen=True)
class LatentRecipe:
    """How a run of latent steps was made; part of a context's identity.

    Attributes:
        method: The step function f(h): ``"soft"`` (expected input embedding), ``"ridge"`` or ``"rescale"``; or
            ``"projection"``: no steps of this model, but another one's thought (`avp_agents.crossing`).
        k: Number of most likely tokens in the soft embedding; None is the whole vocabulary. Only for ``"soft"``.
        temperature: Softmax temperature of the soft embedding.
        renormalise: Whether the result is rescaled to the mean norm of the input embeddings.
        steps: Steps asked for.
        stop_cosine: Stop when the cosine between consecutive hidden states exceeds this.
        stop_entropy: Stop when the entropy (nats) of the next-token distribution falls below this.
    """

    method: LatentMethod | Literal["projection"]
    k: int | None
    temperature: float
    renormalise: bool
    steps: int
    stop_cosine: float | None = None
    stop_entropy: float | None = None

    def canonical(self) -> bytes:
        """A stable byte string of all fields, for digests."""
        fields = (self.method, self.k, float(self.temperature).hex(), self.renormalise, self.steps)
        stops = (_hex_or_none(self.stop_cosine), _hex_or_none(self.stop_entropy))
        return repr(fields + stops).encode()


def _hex_or_none(value: float | None) -> str | None:
    return None if value is None else float(value).hex()


@dataclass(frozen=True)
class TokenSegment:
    """Token ids, in order: prompt, generated or sampled."""

    token_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the ids as int32."""
        return 4 * len(self.token_ids)

    def recipe_bytes(self) -> bytes:
        """What identifies this segment within its lineage."""
        try:
            return b"tokens" + np.asarray(self.token_ids, dtype="<i4").tobytes()
        except OverflowError as error:
            raise ConfigurationError("Token ids lie between 0 and 2**31 - 1.") from error


@dataclass(frozen=True, eq=False)
class LatentSegment:
    """The embeddings that the latent steps fed back to the model.

    Attributes:
        embeddings: ``[steps, hidden]``, in the model's dtype, on the CPU.
        recipe: How they were made.
        origin: Which lineage they were made behind, where that is not the one that stands before them, because they
            were joined to it from another context: 64 hex digits, a digest of that context's recipe up to them. None
            where they were made in place.
    """

    embeddings: torch.Tensor
    recipe: LatentRecipe
    origin: str | None = None

    def __len__(self) -> int:
        return int(self.embeddings.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings."""
        return self.embeddings.numel() * self.embeddings.element_size()

    def recipe_bytes(self) -> bytes:
        """What identifies this segment within its lineage: how it was made, never the values.

        Values differ in their last bits with the company they were computed in; the recipe does not.
        """
        made = b"latent" + len(self).to_bytes(4, "little") + self.recipe.canonical()
        return made if self.origin is None else made + b"|from " + self.origin.encode()


@dataclass(frozen=True, eq=False)
class SplicedSegment:
    """Positions that were computed without seeing all of what stands before them, and then moved behind it.

    They were computed behind the first `prefix` positions of their lineage alone; then their keys were rotated to the
    positions that they have now. Whatever follows sees them and everything else. So a spliced context has other
    keys and values, and another recipe, than one with the same positions in one piece.

    Attributes:
        segments: The positions, in order. They may hold splices of their own.
        prefix: Leading positions of the lineage (as it was for them) that they saw.
    """

    segments: tuple[Segment, ...]
    prefix: int

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self.segments)

    def recipe_bytes(self) -> bytes:
        """What identifies this segment within its lineage."""
        recipes = [segment.recipe_bytes() for segment in self.segments]
        parts = b"".join(len(recipe).to_bytes(4, "little") + recipe for recipe in recipes)
        return b"spliced" + self.prefix.to_bytes(4, "little") + parts


Segment = TokenSegment | LatentSegment | SplicedSegment


def leaves(lineage: Iterable[Segment]) -> Iterator[TokenSegment | LatentSegment]:
    """The segments of a lineage in order, those within splices included."""
    for segment in lineage:
        if isinstance(segment, SplicedSegment):
            yield from leaves(segment.segments)
        else:
            yield segment


def prefix_of(lineage: Iterable[Segment], positions: int) -> tuple[Segment, ...]:
    """The first `positions` positions of a lineage.

    Raises:
        ConfigurationError: The cut would fall inside a run of latent steps, or inside a splice.
    """
    kept: list[Segment] = []
    for segment in lineage:
        if positions <= 0:
            break
        if len(segment) > positions:
            if not isinstance(segment, TokenSegment):
                raise ConfigurationError("A lineage cannot be cut inside a run of latent steps, or inside a splice.")
            segment = TokenSegment(segment.token_ids[:positions])
        kept.append(segment)
        positions -= len(segment)
    return tuple(kept)


@dataclass(frozen=True, eq=False)
class Readout:
    """What the model was about to say after the last latent step.

    Attributes:
        hidden: ``[hidden]``, the last hidden state h_N (after the final norm), not fed back; model dtype, CPU.
        token_ids: ``[k]`` int64, the most likely next tokens, most likely first.
        probabilities: ``[k]`` float32, their probabilities.
    """

    hidden: torch.Tensor
    token_ids: torch.Tensor
    probabilities: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        tensors = (self.hidden, self.token_ids, self.probabilities)
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class _Attachments:
    """What surrounds an immutable context without being part of its value."""

    kv: KvCache | None = None
    handle: ContextHandle | None = None
    usage: Usage | None = None
    handoff: Handoff | None = None


@dataclass(frozen=True, eq=False)
class Context:
    """An immutable lineage of one model, with an optional readout and, while it lasts, a KV-cache.

    Attributes:
        fingerprint: Which weights, architecture and tokenizer (hex digest).
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        lineage: The segments, oldest first.
        readout: What the model was about to say; present after latent steps.

    Example:
        >>> context = engine.think("Analyze: 24 * 17 + 3", steps=20)
        >>> len(context), [type(s).__name__ for s in context.lineage]
        (61, ['TokenSegment', 'LatentSegment'])
    """

    fingerprint: str
    dtype: str
    lineage: tuple[Segment, ...]
    readout: Readout | None = None
    _attached: _Attachments = field(default_factory=_Attachments, repr=False)

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.lineage)

    @cached_property
    def recipe_ids(self) -> tuple[str, ...]:
        """One digest per prefix of the lineage: ``recipe_ids[i]`` identifies ``lineage[: i + 1]``; 64 hex digits."""
        digest = hashlib.blake2b(f"avp1|{self.fingerprint}|{self.dtype}".encode(), digest_size=32).digest()
        ids = []
        for segment in self.lineage:
            digest = hashlib.blake2b(digest + segment.recipe_bytes(), digest_size=32).digest()
            ids.append(digest.hex())
        return tuple(ids)

    @property
    def recipe_id(self) -> str:
        """Digest of the whole recipe: fingerprint, dtype, token ids, latent recipes. Never of latent values."""
        if not self.lineage:
            raise ConfigurationError("An empty context has no recipe id; a context starts with at least one token.")
        return self.recipe_ids[-1]

    @property
    def kv(self) -> KvCache | None:
        """The KV-cache, if one is attached and still available."""
        kv = self._attached.kv
        return kv if kv is not None and kv.available else None

    @property
    def kv_len(self) -> int:
        """Positions whose keys and values are cached; after generation the last token's may be missing."""
        kv = self.kv
        return 0 if kv is None else kv.length

    @property
    def has_whole_kv(self) -> bool:
        """Whether all of it is cached, but for the last token of an answer, which nobody has fed."""
        return self.kv is not None and self.kv_len >= len(self) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of lineage and readout: what must be kept so that nothing is lost."""
        return sum(s.nbytes for s in self.lineage) + (self.readout.nbytes if self.readout else 0)

    @property
    def latent_steps(self) -> int:
        """Latent positions in the whole lineage."""
        return sum(len(s) for s in leaves(self.lineage) if isinstance(s, LatentSegment))

    @property
    def is_text(self) -> bool:
        """Whether the lineage consists of tokens only."""
        return all(isinstance(segment, TokenSegment) for segment in self.lineage)

    def token_ids(self) -> tuple[int, ...]:
        """All token ids in order, latent positions left out."""
        return tuple(t for s in leaves(self.lineage) if isinstance(s, TokenSegment) for t in s.token_ids)

    def extends(self, other: Context) -> bool:
        """Whether `other`'s lineage is a prefix of this one's (same recipe)."""
        n = len(other.lineage)
        return n <= len(self.lineage) and self.recipe_ids[:n] == other.recipe_ids

    @property
    def handle(self) -> ContextHandle | None:
        """The handle of the newest put, None before the first."""
        return self._attached.handle

    def with_kv(self, kv: KvCache) -> Context:
        """The same value with another KV-cache attached; this object keeps its own."""
        return replace(self, _attached=replace(self._attached, kv=kv))

    def without_kv(self) -> Context:
        """The same value without a KV-cache, under the same handle."""
        return Context(self.fingerprint, self.dtype, self.lineage, self.readout, _Attachments(handle=self.handle))

    @property
    def usage(self) -> Usage | None:
        """What making this context cost; None for a context that came out of a store."""
        return self._attached.usage

    @property
    def handoff(self) -> Handoff | None:
        """How the context's parent was used when it was made; None for a context that came out of a store."""
        return self._attached.handoff

    def prefix(self, positions: int) -> Context:
        """The context of the first `positions` positions, to fork or roll back; a token segment may be cut.

        Raises:
            ConfigurationError: The cut would fall inside a run of latent steps, or inside a splice.
        """
        return Context(self.fingerprint, self.dtype, prefix_of(self.lineage, positions))

    def attach(
        self,
        *,
        kv: KvCache | None = None,
        handle: ContextHandle | None = None,
        usage: Usage | None = None,
        handoff: Handoff | None = None,
    ) -> None:
        """Note where this context's KV-cache or stored record is, or what making it cost. Its value does not change."""
        given = {"kv": kv, "handle": handle, "usage": usage, "handoff": handoff}
        for name, value in given.items():
            if value is not None:
                setattr(self._attached, name, value)

    def detach_kv(self) -> None:
        """Forget the KV-cache; the next use replays the lineage."""
        self._attached.kv = None

    def to_handle(self) -> ContextHandle:
        """The handle under which this context was put into a store.

        Raises:
            NotStoredError: It never was. Call ``store.put(context)`` first.
        """
        if self._attached.handle is None:
            raise NotStoredError("This context was never stored. Call store.put(context), which returns its handle.")
        return self._attached.handle
