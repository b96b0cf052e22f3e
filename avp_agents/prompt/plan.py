"""Prompts to token ids, on top of the contexts that their messages stand for.

`PromptRenderer.plan` says what to prefill: a base context, if the prompt continues or is handed one, and the ids behind
it. Which context that is, and which messages are rendered, is decided in `prompt_lineage` (its table has all cases);
how turns are rendered in `turns`; how message content stays data in `prompt_encoder`.

A base's lineage ends in an open assistant turn. The ids behind it first end that turn, without repeating an end-of-turn
id that the lineage holds already. Where no message follows a thought, nothing is appended: the model says what it was
about to say (an empty turn behind the thought is often answered by nothing at all). All other plans end in a newly
opened assistant turn, and hold one BOS at most: where the template (or, for raw text, the tokenizer) puts it, at the
start of a fresh prompt.

Templates that treat earlier answers otherwise than the newest (they drop what was reasoned before it) have their way:
such answers are rendered again, and a KV-cache serves as far as its ids agree with what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from avp_agents.answer.builder import CLOSING, OPENING, ReasoningSplit
from avp_agents.answer.tool_format import GENERIC, ToolDefinition, ToolFormat
from avp_agents.context import Context, LatentSegment, TokenSegment
from avp_agents.errors import ConfigurationError, ContextWindowError, PromptError
from avp_agents.prompt.chat_messages import Prompt, Turn, read_messages
from avp_agents.prompt.chat_template import Rendering, TurnRenderer
from avp_agents.prompt.continuation import Line, LineageWalk
from avp_agents.prompt.encoder import PromptEncoder
from avp_agents.prompt.whole_turns import WholeTurns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OWN_OPTIONS = frozenset({"add_generation_prompt", "continue_final_message", "conversation", "return_dict", "tokenize"})
_KEPT_RENDERERS = 16
_TAIL = 16
"""Ids from the end of a prompt that are looked at for an opening marker."""


@dataclass(frozen=True)
class PromptPlan:
    """What to prefill for a prompt. Its length is in positions, those of the base included.

    Attributes:
        base: The context that the new tokens are appended to, or None.
        token_ids: The new positions; with a chat template they end in an open assistant turn. Empty where a thought's
            own open turn goes on.
        relation: ``"fresh"`` (no base), ``"continuation"`` (the base was made from the messages before it) or
            ``"handoff"`` (the base was made from another prompt, or given explicitly).
        reuse: A context that begins like base and `token_ids`, so that its KV-cache may serve as far as they agree. It
            never changes the result.
        notes: What was changed to please the template, and which contexts were rendered as text.
        opens_reasoning: The prompt ends in ``<think>``: the answer begins with reasoning.
    """

    base: Context | None
    token_ids: tuple[int, ...]
    relation: Literal["fresh", "continuation", "handoff"]
    reuse: Context | None = None
    notes: tuple[str, ...] = ()
    opens_reasoning: bool = False

    def __len__(self) -> int:
        return len(self.token_ids) + (0 if self.base is None else len(self.base))

    def check_window(self, window: int, requested: int) -> None:
        """Refuse a prompt that leaves no room for so many more positions.

        Raises:
            ContextWindowError: It does not.
        """
        if len(self) + requested > window:
            context = len(self.base) if self.base is not None else 0
            raise ContextWindowError(window=window, context=context, prompt=len(self.token_ids), requested=requested)

    def reasoning_split(self, *, marked: bool) -> ReasoningSplit:
        """How an answer to it is split; `marked` is `PromptRenderer.marks_reasoning`."""
        if self.opens_reasoning:
            return ReasoningSplit("reasoning")
        return ReasoningSplit("start" if marked else "text")


class PromptRenderer:
    """Plans prompts for one tokenizer. Safe to use from many threads.

    Args:
        tokenizer: A fast tokenizer; it is read, never changed. Its chat template is read now.
        chat_template_kwargs: Options of the chat template, for example ``{"enable_thinking": False}``; a prompt may
            have others.
        eos_token_ids: Ids that end an answer beside the tokenizer's own: those of the model's generation config.

    Attributes:
        marks_reasoning: Whether the model's answers may begin with ``<think>``.

    Raises:
        UnsupportedModelError: The tokenizer is not a fast one, or cannot be copied exactly.
        ConfigurationError: A chat template option is one that rendering sets itself, or is not JSON data.

    Example:
        >>> renderer = PromptRenderer(tokenizer)
        >>> renderer.plan("24 * 17 + 3?", context=context).relation
        'handoff'
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer)
        self._options = dict(chat_template_kwargs or {})
        self._renderers: dict[str, TurnRenderer] = {}
        self._lock = Lock()
        self._has_template = bool(tokenizer.chat_template)
        end_of_turn = self._turns(None).end_of_turn if self._has_template else None
        own = (tokenizer.eos_token_id, end_of_turn)
        self._stop_ids = frozenset((*(id_ for id_ in own if isinstance(id_, int)), *eos_token_ids))
        self.marks_reasoning = self._encoder.knows(OPENING) or self._encoder.knows(CLOSING)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an assistant turn: the end-of-sequence ids and the template's own end-of-turn id."""
        return self._stop_ids

    @cached_property
    def whole_turns(self) -> WholeTurns:
        """The boundaries of the model's turns.

        Raises:
            PromptError: The template does not render a conversation.
        """
        renderer = self._turns(None) if self._has_template else None
        return WholeTurns(self._tokenizer, self._encoder, renderer, self._stop_ids)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls."""
        return (self._turns(None).tool_format() if self._has_template else None) or GENERIC

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that no text can become."""
        return self._encoder.control_ids

    def plan(
        self,
        prompt: Prompt,
        context: Context | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[ToolDefinition] = (),
    ) -> PromptPlan:
        """What to prefill for `prompt`, on top of `context` and of the contexts its messages stand for.

        Args:
            prompt: Messages, or text: one user message, or raw text where the tokenizer has no chat template. With
                `context`, no messages at all open a new assistant turn at once.
            context: A context to hand over explicitly. Messages that it begins with are not rendered again.
            chat_template_kwargs: Options of the chat template for this prompt, over the renderer's own.
            tools: What the model is shown as its tools, unless the prompt continues one that showed them.

        Raises:
            PromptError: The prompt is empty or malformed, or the template cannot render it.
            ConfigurationError: A chat template option is one that rendering sets itself, or is not JSON data.
        """
        if not self._has_template:
            if tools:
                raise ConfigurationError("The tokenizer has no chat template, so the model cannot be shown tools.")
            return self._plan_raw(prompt, context)
        turns = read_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        if not turns and context is None:
            raise PromptError("The prompt has no messages; pass at least one.")
        return self._plan_turns(self._turns(chat_template_kwargs, tools), turns, context)

    def render(self, messages: Prompt) -> list[int]:
        """The ids of the whole prompt, contexts rendered as text, with the generation prompt open.

        Raises:
            PromptError: As for `plan`.
        """
        if not self._has_template or isinstance(messages, str):
            return list(self.plan(messages).token_ids)
        return list(self._turns(None).whole([turn.message for turn in read_messages(messages)]).token_ids)

    def count(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[ToolDefinition] = (),
    ) -> int:
        """Positions of the prompt with its tools, those of a context that it continues included.

        Raises:
            PromptError, ConfigurationError: As for `plan`.
        """
        return len(self.plan(prompt, chat_template_kwargs=chat_template_kwargs, tools=tools))

    def encode(self, text: str) -> list[int]:
        """The ids of a text as message content: no template, no BOS, control tokens in it are plain text.

        Raises:
            PromptError: The text holds a lone surrogate.
        """
        return list(self._encoder.encode(self._encoder.mark(text)))

    def _turns(
        self, chat_template_kwargs: Mapping[str, Any] | None, tools: Sequence[ToolDefinition] = ()
    ) -> TurnRenderer:
        """The renderer for these template options and tools; the latest ones are kept."""
        options = {**self._options, **(chat_template_kwargs or {})}
        if taken := sorted(_OWN_OPTIONS & options.keys()):
            raise ConfigurationError(f"chat_template_kwargs cannot set {', '.join(taken)}: rendering sets that itself.")
        shown = self.tool_format.tools_text(tools) if tools else ""
        if shown and self.tool_format.is_native:
            options["tools"] = list(tools)
        try:
            key = json.dumps([options, shown])
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"chat_template_kwargs must be JSON data: {error}.") from error
        with self._lock:
            renderer = self._renderers.pop(key, None) or TurnRenderer(self._tokenizer, self._encoder, options, shown)
            self._renderers[key] = renderer
            if len(self._renderers) > _KEPT_RENDERERS:
                del self._renderers[next(iter(self._renderers))]
        return renderer

    def _plan_turns(self, renderer: TurnRenderer, turns: list[Turn], context: Context | None) -> PromptPlan:
        def rendering_of(line: Line) -> Rendering:
            messages = line.messages
            if line.base is None:
                return renderer.whole(messages)
            messages = messages if line.continues else renderer.shown_tools + messages
            if not messages and isinstance(line.base.lineage[-1], LatentSegment):
                return Rendering((), ("nothing new to say: the thought's own turn goes on",))
            return renderer.appended(messages, turn_ended=self._ends_turn(line.base))

        if context is None and all(turn.context is None for turn in turns):
            whole = renderer.whole([turn.message for turn in turns])
            opens = self._ends_open(None, whole.token_ids)
            return PromptPlan(None, whole.token_ids, "fresh", notes=whole.notes, opens_reasoning=opens)
        if context is not None and (rest := _behind_rendered(context, turns, renderer)) is not None:
            return PromptPlan(
                context, rest.token_ids, "continuation", None, rest.notes, self._ends_open(context, rest.token_ids)
            )
        walk = LineageWalk(turns, lambda line: rendering_of(line).token_ids, keeps_opening=renderer.keeps_opening)
        line = walk.follow(context)
        rendering = rendering_of(line)
        return PromptPlan(
            base=line.base,
            token_ids=rendering.token_ids,
            relation="fresh" if line.base is None else "continuation" if line.continues else "handoff",
            reuse=_longest_prefix(line, rendering.token_ids),
            notes=rendering.notes + _contexts_as_text(line),
            opens_reasoning=self._ends_open(line.base, rendering.token_ids),
        )

    def _plan_raw(self, prompt: Prompt, context: Context | None) -> PromptPlan:
        if not isinstance(prompt, str):
            raise PromptError(
                "The tokenizer has no chat template, so it cannot render messages. Pass a string, or set "
                "tokenizer.chat_template."
            )
        text = self._encoder.mark(prompt)
        if context is None:
            token_ids = self._encoder.raw_prefix + self._encoder.encode(text)
        else:
            token_ids = self._encoder.encode(text, continued=True)
        if not token_ids:
            raise PromptError("The prompt is empty; pass some text.")
        relation = "fresh" if context is None else "handoff"
        return PromptPlan(context, token_ids, relation, opens_reasoning=self._ends_open(context, token_ids))

    def _ends_turn(self, context: Context) -> bool:
        last = context.lineage[-1] if context.lineage else None
        return isinstance(last, TokenSegment) and not self._stop_ids.isdisjoint(last.token_ids[-1:])

    def _ends_open(self, base: Context | None, token_ids: tuple[int, ...]) -> bool:
        """Whether the prompt's last tokens (before a thought, if that goes on) are the opening marker of reasoning."""
        if not self.marks_reasoning:
            return False
        if not token_ids and base is not None:
            token_ids = next((s.token_ids for s in reversed(base.lineage) if isinstance(s, TokenSegment)), ())
        tail = self._tokenizer.decode(list(token_ids[-_TAIL:]), skip_special_tokens=False)
        return str(tail).rstrip().endswith(OPENING)


def _behind_rendered(context: Context, turns: list[Turn], renderer: TurnRenderer) -> Rendering | None:
    """What follows a text context in the whole rendered prompt; None if that does not begin with the context."""
    if not context.is_text or any(turn.context is not None for turn in turns):
        return None
    if not any(turn.message["role"] == "assistant" for turn in turns):
        return None
    try:
        whole = renderer.whole([turn.message for turn in turns])
    except PromptError:  # behind the context it may still be rendered
        return None
    rest = whole.token_ids[len(context) :]
    return Rendering(rest, whole.notes) if rest and whole.token_ids[: len(context)] == context.token_ids() else None


def _longest_prefix(line: Line, token_ids: tuple[int, ...]) -> Context | None:
    """The pending turns' context that agrees with the most leading ids behind the base, if one agrees with any."""
    contexts = [turn.context for turn in line.pending if turn.context is not None]
    best = max(contexts, key=lambda context: _agreement(context, line.base, token_ids), default=None)
    return best if best is not None and _agreement(best, line.base, token_ids) else None


def _agreement(context: Context, base: Context | None, token_ids: tuple[int, ...]) -> int:
    """How many ids behind the base are the same."""
    if base is not None and not context.extends(base):
        return 0
    behind = context.lineage[0 if base is None else len(base.lineage) :]
    texts = takewhile(lambda segment: isinstance(segment, TokenSegment), behind)
    ours = tuple(id_ for segment in texts if isinstance(segment, TokenSegment) for id_ in segment.token_ids)
    pairs = zip(ours, token_ids, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(token_ids)))


def _contexts_as_text(line: Line) -> tuple[str, ...]:
    """One note per context that the plan neither continues nor holds, and per answer that was rendered again."""
    reason = "it was made from another prompt" if line.base is None else "the context that is used does not extend it"
    carrying = [turn for turn in line.pending if turn.context is not None and turn.index not in line.rewritten]
    outcomes = {turn.index: "left out" if turn.is_bare_thought else "rendered as text" for turn in carrying}
    return tuple(f"context of message {index} {outcome}: {reason}" for index, outcome in outcomes.items()) + tuple(
        f"message {index} rendered again: the template treats earlier answers otherwise" for index in line.rewritten
    )
