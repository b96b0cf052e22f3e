"""What a request cost, and how a context reached it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

HandoffMode = Literal["none", "kv", "replay", "rethink", "projection", "reread", "text", "lost"]


@dataclass(frozen=True)
class Usage:
    """What a request cost.

    Attributes:
        prompt_tokens: Positions the answer was conditioned on: context and prompt, reused ones included.
        positions_reused: Those of them whose keys and values were already there.
        latent_steps: Latent steps run by this request.
        completion_tokens: Tokens decoded by this request.
        reasoning_tokens: Those of them that a reasoning model decoded before its text.
        queue_seconds, prefill_seconds, latent_seconds, decode_seconds: Wall time per phase.
    """

    prompt_tokens: int = 0
    positions_reused: int = 0
    latent_steps: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    latent_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall time of all phases."""
        return self.queue_seconds + self.prefill_seconds + self.latent_seconds + self.decode_seconds


@dataclass(frozen=True)
class Handoff:
    """How a context reached this request.

    Attributes:
        mode: ``"none"`` where no context was given.
        reason: Why this mode, in a few words.
        bytes: Bytes that had to move: 0 by reference, else KV or lineage.
        milliseconds: Time spent on making the context usable.
        positions_reused: Positions of the context whose keys and values were there.
        positions_replayed: Positions of the context that were prefilled again.
        notes: What else was decided, such as a system message merged into the user turn.
        estimated_ms: What each mode that the handshake weighed was expected to take; empty where it weighed none.
    """

    mode: HandoffMode = "none"
    reason: str = ""
    bytes: int = 0
    milliseconds: float = 0.0
    positions_reused: int = 0
    positions_replayed: int = 0
    notes: tuple[str, ...] = ()
    estimated_ms: Mapping[str, float] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, Any]:
        """As JSON data, for a response's metadata."""
        return asdict(self) | {"notes": list(self.notes), "milliseconds": round(self.milliseconds, 3)}
