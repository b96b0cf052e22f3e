"""The messages that a lineage of token ids was rendered from, read back with the model's own chat template.

A template puts control tokens between contents, and no content can hold one (`avp_agents.prompt.encoder`). A
conversation of known words is rendered once to see what stands before and behind a content of each role; lineages are
cut there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from avp_agents.context import Context
from avp_agents.crossing.thought import SpokenMessage, SpokenRole
from avp_agents.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# private-use characters around each control token, so that it differs from the same letters in a content
_OPEN, _CLOSE = "\ue010", "\ue011"
_UNIT = re.compile(f"{_OPEN}[^{_CLOSE}]*{_CLOSE}|.", re.DOTALL)
_CALL = {"type": "function", "id": "callwords", "function": {"name": "look", "arguments": {"at": "callwords"}}}

Render = Callable[[Sequence[dict[str, Any]]], Sequence[int]]
"""Chat messages to the ids of a prompt that ends in an open assistant turn; raises `PromptError` if it cannot."""


class TranscriptReader:
    """Reads lineages of one model.

    Args:
        tokenizer: The model's.
        render: Its chat template; None where it has none, and a prompt is one raw text.
        control_ids: Ids that no content can become.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, render: Render | None, control_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._control = {id_: f"{_OPEN}{tokenizer.convert_ids_to_tokens(id_)}{_CLOSE}" for id_ in control_ids}
        self._delimiters = _Delimiters(lambda messages: self._text(render(messages))) if render is not None else None

    def read(self, context: Context) -> tuple[SpokenMessage, ...]:
        """All messages of a context in order, what the model itself said last included; empty ones are left out.

        Without a chat template it is one user message. Where the template gives system prompts no turn of their own, a
        first user message of several paragraphs may begin with one. That cannot be told, so it is called a system
        message.
        """
        text = self._text(context.token_ids())
        if self._delimiters is None:
            found = [SpokenMessage("user", self._without_control(text))]
        else:
            found = self._delimiters.cut(text)
        said = [SpokenMessage(m.role, self._without_control(m.content).strip()) for m in found]
        said = [message for message in said if message.content]
        hides_system = self._delimiters is not None and not self._delimiters.system_has_turn
        if hides_system and said and said[0].role == "user" and "\n\n" in said[0].content:
            said[0] = SpokenMessage("system", said[0].content)
        return tuple(said)

    def _text(self, ids: Sequence[int]) -> str:
        """The ids as text, control tokens marked as such."""
        parts: list[str] = []
        run: list[int] = []
        for id_ in ids:
            if id_ in self._control:
                parts += [self._decode(run), self._control[id_]]
                run = []
            else:
                run.append(id_)
        return "".join([*parts, self._decode(run)])

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text.replace(_OPEN, "").replace(_CLOSE, "")

    def _without_control(self, text: str) -> str:
        return re.sub(f"{_OPEN}[^{_CLOSE}]*{_CLOSE}", "", text)


class _Delimiters:
    """What a template puts before and behind a content of each role.

    Attributes:
        system_has_turn: Whether a control token stands between a system prompt and what follows it.
    """

    def __init__(self, render: Callable[[Sequence[dict[str, Any]]], str]) -> None:
        around: dict[SpokenRole, list[tuple[str, str]]] = {
            role: _around_words(render, messages, role) for role, messages in _PROBES.items()
        }
        self.system_has_turn = any(_CLOSE in after for _, after in around["system"])
        if not self.system_has_turn:
            del around["system"]
        behind = {role: _common_start([after for _, after in pairs]) for role, pairs in around.items()}
        self._closings = {role: _up_to_control(text) for role, text in behind.items()}
        self._roles: dict[str, SpokenRole] = {}
        for role, pairs in around.items():
            opening = self._without_closing(_common_end([before for before, _ in pairs]))
            if opening.strip():
                self._roles.setdefault(opening, role)
        longest_first = sorted(self._roles, key=len, reverse=True)
        self._opening = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def cut(self, text: str) -> list[SpokenMessage]:
        """The messages of a rendered text; one user message where no opening is found."""
        messages: list[SpokenMessage] = []
        found = list(self._opening.finditer(text))
        if not found:
            return [SpokenMessage("user", text)]
        stops = [*(match.start() for match in found[1:]), len(text)]
        for match, stop in zip(found, stops, strict=True):
            role = self._roles[match[0]]
            content, _, _ = text[match.end() : stop].partition(self._closings[role] or _OPEN)
            messages.append(SpokenMessage(role, content))
        return messages

    def _without_closing(self, opening: str) -> str:
        """What stands before a content, without the end of the turn before it (unless there is nothing else)."""
        closings = [closing for closing in self._closings.values() if _CLOSE in closing]
        ends = [opening.rfind(closing) + len(closing) for closing in closings if closing in opening]
        return opening[max(ends, default=0) :].lstrip() or opening


def _word(role: str, number: int) -> str:
    return f"{role}word{number}"


def _said(*roles: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, role in enumerate(roles):
        content = _word(role, number)
        if role == "call":
            messages.append({"role": "assistant", "content": "", "tool_calls": [_CALL]})
        elif role == "tool":
            messages.append({"role": "tool", "content": content, "tool_call_id": "callwords", "name": "look"})
        else:
            messages.append({"role": role, "content": content})
    return messages


_PROBES: dict[SpokenRole, list[dict[str, Any]]] = {
    "tool": _said("user", "call", "tool", "assistant", "user"),
    "user": _said("user", "assistant", "user"),
    "assistant": _said("user", "assistant", "user", "assistant", "user"),
    "system": _said("system", "user"),
}


def _around_words(
    render: Callable[[Sequence[dict[str, Any]]], str], messages: list[dict[str, Any]], role: str
) -> list[tuple[str, str]]:
    """The text before and behind each word of `role`, up to the words next to it."""
    try:
        text = render(messages)
    except PromptError:  # the template has no such role
        return []
    words = [message["content"] for message in messages if message["content"]]
    pieces = re.split("|".join(map(re.escape, words)), text)
    if len(pieces) != len(words) + 1:
        return []
    return [(pieces[i], pieces[i + 1]) for i, word in enumerate(words) if word.startswith(f"{role}word")]


def _common_start(texts: list[str]) -> str:
    """What all texts begin with; a control token counts as one character."""
    same = takewhile(lambda units: len(set(units)) == 1, zip(*map(_UNIT.findall, texts), strict=False))
    return "".join(units[0] for units in same)


def _common_end(texts: list[str]) -> str:
    """What all texts end with."""
    turned = [_UNIT.findall(text)[::-1] for text in texts]
    same = takewhile(lambda units: len(set(units)) == 1, zip(*turned, strict=False))
    return "".join([units[0] for units in same][::-1])


def _up_to_control(text: str) -> str:
    """The text up to and with its first control token; all of it where it has none."""
    return text[: text.find(_CLOSE) + 1] if _CLOSE in text else text
