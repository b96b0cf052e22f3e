"""The real engine, watched, and with words put into the model's mouth where a test needs them.

The model decodes scripted answers itself (a grammar allows nothing else), so prompts, contexts and KV-caches are real.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from avp_agents import Context, LatentEngine
from avp_agents.answer.grammar import Grammar


@dataclass(frozen=True)
class Request:
    """What the engine was asked."""

    kind: str
    prompt: list[dict[str, Any]]
    context: Context | None
    options: dict[str, Any]

    @property
    def text(self) -> str:
        """All that the prompt says."""
        return "\n".join(str(message["content"]) for message in self.prompt)


@dataclass
class ScriptedEngine:
    """Implements `avp_agents.engine.protocol.Engine` by a `LatentEngine`.

    Attributes:
        script: The next answers, in order; where it is empty (or has None) the model says what it likes.
        requests: What was asked, in order.
    """

    engine: LatentEngine
    script: list[str | None] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def think(self, prompt: Any, *, context: Context | None = None, **options: Any) -> Context:
        self.requests.append(Request("think", prompt, context, options))
        return self.engine.think(prompt, context=context, **options)

    async def athink(self, prompt: Any, *, context: Context | None = None, **options: Any) -> Context:
        self.requests.append(Request("think", prompt, context, options))
        return await self.engine.athink(prompt, context=context, **options)

    def stream(self, prompt: Any, *, context: Context | None = None, **options: Any) -> Any:
        self.requests.append(Request("generate", prompt, context, options))
        return self.engine.stream(prompt, context=context, **self._scripted(options))

    def astream(self, prompt: Any, *, context: Context | None = None, **options: Any) -> Any:
        self.requests.append(Request("generate", prompt, context, options))
        return self.engine.astream(prompt, context=context, **self._scripted(options))

    def join(self, contexts: Sequence[Context], **options: Any) -> Context:
        self.requests.append(Request("join", [], None, {"contexts": contexts, **options}))
        return self.engine.join(contexts, **options)

    def _scripted(self, options: dict[str, Any]) -> dict[str, Any]:
        words = self.script.pop(0) if self.script else None
        if words is None:
            return options
        return {**options, "grammar": Grammar.lark(f"start: {json.dumps(words)}"), "max_tokens": 200}
