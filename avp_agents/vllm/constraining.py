"""A grammar as vLLM's structured outputs take it. vLLM has to run llguidance (its backend ``guidance``), as we do.

Everything becomes one lark grammar, so that JSON has the same form as a `LatentEngine` gives it, and so that a grammar
can come behind what the model reasons first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avp_agents.answer.grammar import Grammar, lark_pattern

_BEHIND = """%llguidance {}
start: head /\\n{0,2}/ answer
"""


@dataclass(frozen=True)
class Marker:
    """What an answer comes behind; before it anything may stand.

    Attributes:
        text: The marker.
        token_id: Its id, where it is a control token; None where it is text.
    """

    text: str
    token_id: int | None

    @property
    def lark(self) -> str:
        """A rule ``head`` that ends with it."""
        if self.token_id is not None:
            return f"head: /(?s:.*)/ <[{self.token_id}]>\n"
        return f"head[lazy]: /(?s:.*){lark_pattern(self.text)}/\n"


def structured_outputs(grammar: Grammar, *, after: Marker | None = None) -> dict[str, Any]:
    """The field of vLLM's ``structured_outputs`` for a grammar.

    Args:
        grammar: What the answer may be.
        after: What it comes behind, if anything.
    """
    if after is None:
        if grammar.kind == "regex":
            return {"regex": grammar.source}
        return {"grammar": grammar.source if grammar.kind == "lark" else f"start: %json {grammar.source}\n"}
    match grammar.kind:
        case "regex":
            answer = f"answer: /{_between_slashes(grammar.source)}/\n"
        case "json_schema":
            answer = f"answer: %json {grammar.source}\n"
        case "lark":
            answer = f"answer: %lark {{\n{grammar.source}\n}}\n"
    return {"grammar": _BEHIND + after.lark + answer}


def _between_slashes(pattern: str) -> str:
    """A pattern in which no slash ends it."""
    escaped, parts = False, []
    for character in pattern:
        parts.append("\\/" if character == "/" and not escaped else character)
        escaped = character == "\\" and not escaped
    return "".join(parts)
