"""What CrewAI's event bus told about LLM calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from crewai.events import crewai_event_bus
from crewai.events.types.llm_events import LLMCallCompletedEvent


@dataclass
class Events:
    """What CrewAI was told about LLM calls."""

    all: list[Any] = field(default_factory=list)

    def of(self, kind: type) -> list[Any]:
        crewai_event_bus.flush()
        return sorted((e for e in self.all if isinstance(e, kind)), key=lambda event: event.timestamp)

    @property
    def completed(self) -> list[Any]:
        return self.of(LLMCallCompletedEvent)

    @property
    def handoffs(self) -> list[dict[str, Any]]:
        """The `avp` metadata of each call, in order."""
        return [event.usage["avp"] for event in self.completed]
