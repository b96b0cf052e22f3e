"""What a caller submitted to the scheduler, and where it got its start."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from avp_agents.answer.generation import Chunk
from avp_agents.context import Context, Segment, TokenSegment
from avp_agents.kv_cache import HostKv
from avp_agents.usage import Handoff

if TYPE_CHECKING:
    from avp_agents.store import ContextStore

Event = Chunk | Context | BaseException
"""A piece of an answer (the last one holds the `Generation`), a finished context, or why there is none."""


@dataclass(eq=False)
class Request:
    """What a caller submitted.

    Attributes:
        model: Fingerprint and dtype of the engine.
        store: The caller's. It takes evicted KV-caches; requests of different stores share none.
        base: The context the prompt goes on top of, if any.
        prompt_ids: New ids behind the base.
        relation: How base and prompt belong together, for the handoff's reason.
        prefix: A context whose KV-cache may serve as far as it agrees; where there is a base, it extends that.
        host_kv: KV-cache of `host_context` that a store had, if it is not in the pool.
        host_context: `prefix` or `base`; None without `host_kv`.
        deliver: Called from the scheduler's thread with every event.
        notes: What rendering decided.
        crossed: How contexts of other models were received for this request, if any were.
        source: Admission is fair between sources.
        deadline: `time.monotonic()` at which the request times out.
    """

    model: tuple[str, str]
    store: ContextStore
    base: Context | None
    prompt_ids: tuple[int, ...]
    relation: str
    prefix: Context | None
    host_kv: HostKv | None
    host_context: Context | None
    deliver: Callable[[Event], None]
    notes: tuple[str, ...] = ()
    crossed: Handoff | None = None
    source: str = ""
    deadline: float | None = None
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    @property
    def lineage(self) -> tuple[Segment, ...]:
        """Base and prompt."""
        base = self.base.lineage if self.base is not None else ()
        return (*base, TokenSegment(self.prompt_ids)) if self.prompt_ids else base


@dataclass(frozen=True)
class Placement:
    """How a sequence got its start in the pool.

    Attributes:
        reused: Positions whose keys and values were there.
        start: The first position to feed; the last one is fed for its hidden state even where its keys are there.
        bytes_moved: Bytes uploaded from the host.
        seconds: Time for finding, copying and uploading.
    """

    reused: int = 0
    start: int = 0
    bytes_moved: int = 0
    seconds: float = 0.0
