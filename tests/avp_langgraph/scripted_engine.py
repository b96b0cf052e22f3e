"""An engine without weights whose model says what a test tells it to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from fake_engine import FakeEngine

from avp_agents.answer.generation import Chunk
from avp_agents.answer.options import GenerateOptions
from avp_agents.context import Context, TokenSegment
from avp_agents.prompt.chat_messages import Prompt


@dataclass
class ScriptedEngine(FakeEngine):
    """A `FakeEngine` with scripted answers.

    Attributes:
        script: The coming answers; each is streamed in pieces of four characters.
    """

    script: deque[str] = field(default_factory=deque)

    def says(self, *answers: str) -> None:
        """Appends to the script."""
        self.script.extend(answers)

    def last_options(self) -> dict[str, Any]:
        """The options of the last request."""
        return dict(self.requests[-1].options)

    def _chunks(self, prompt: Prompt, context: Context | None, options: GenerateOptions) -> list[Chunk]:
        *_, last = super()._chunks(prompt, context, options)
        answer, generation = self.script.popleft(), last.generation
        assert generation is not None
        ids = TokenSegment((*self.encode(answer), *generation.token_ids[-1:]))
        lineage = (*generation.context.lineage[:-1], ids)
        made = Context(generation.context.fingerprint, generation.context.dtype, lineage)
        made.attach(usage=generation.usage, handoff=generation.handoff)
        whole = replace(generation, text=answer, token_ids=ids.token_ids, context=made, finish_reason="stop")
        return [*map(Chunk, _pieces(answer)), Chunk("", generation=whole)]


def _pieces(answer: str) -> Iterable[str]:
    return (answer[i : i + 4] for i in range(0, len(answer), 4))
