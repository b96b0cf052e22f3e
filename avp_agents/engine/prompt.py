"""Prompts to token ids, on top of the contexts that their messages stand for.

`PromptRenderer.plan` says what to prefill: a base context, if the prompt continues or is handed one, and the ids behind
it. Which context that is, and which messages are rendered, is decided in `prompt_lineage` (its table has all cases);
how turns are rendered in `turns`; how message content stays data in `prompt_encoder`.

A base's lineage ends in an open assistant turn. The ids behind it first end that turn, without repeating an end-of-turn
id that the lineage holds already. Where no message follows a thought, nothing is appended: the model says what it was
about to say (an empty turn behind the thought is often answered by nothing at all). All other plans end in a newly
opened assistant turn, and hold one BOS at most: where the template (or, for raw text, the tokenizer) puts it, at the
start of a fresh prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from avp_agents.context import Context, LatentSegment, TokenSegment
from avp_agents.engine.base import Prompt
from avp_agents.engine.prompt_encoder import PromptEncoder
from avp_agents.engine.prompt_lineage import Line, LineageWalk
from avp_agents.engine.turn_messages import Turn, read_messages
from avp_agents.engine.turns import Rendering, TurnRenderer
from avp_agents.errors import ConfigurationError, PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OWN_OPTIONS = frozenset({"add_generation_prompt", "continue_final_message", "conversation", "return_dict", "tokenize"})


@dataclass(frozen=True)
class PromptPlan:
    """What to prefill for a prompt. Its length is in positions, those of the base included.

    Attributes:
        base: The context that the new tokens are appended to, or None.
        token_ids: The new positions; with a chat template they end in an open assistant turn. Empty where a thought's
            own open turn goes on.
        relation: ``"fresh"`` (no base), ``"continuation"`` (the base was made from the messages before it) or
            ``"handoff"`` (the base was made from another prompt, or given explicitly).
        reuse: A token-only context that begins like `token_ids`, so that its KV-cache may serve as far as they agree.
            It never changes the result.
        notes: What was changed to please the template, and which contexts were rendered as text.
    """

    base: Context | None
    token_ids: tuple[int, ...]
    relation: Literal["fresh", "continuation", "handoff"]
    reuse: Context | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids) + (0 if self.base is None else len(self.base))


class PromptRenderer:
    """Plans prompts for one tokenizer. Safe to use from many threads.

    Args:
        tokenizer: A fast tokenizer; it is read, never changed. Its chat template is read now.
        chat_template_kwargs: Options of the chat template, for example ``{"enable_thinking": False}``.
        eos_token_ids: Ids that end an answer beside the tokenizer's own: those of the model's generation config.

    Raises:
        UnsupportedModelError: The tokenizer is not a fast one, or cannot be copied exactly.
        ConfigurationError: A chat template option is one that rendering sets itself.

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
        options = dict(chat_template_kwargs or {})
        if taken := sorted(_OWN_OPTIONS & options.keys()):
            raise ConfigurationError(f"chat_template_kwargs cannot set {', '.join(taken)}: rendering sets that itself.")
        self._encoder = PromptEncoder(tokenizer)
        self._turns = TurnRenderer(tokenizer, self._encoder, options) if tokenizer.chat_template else None
        own = (tokenizer.eos_token_id, self._turns.end_of_turn if self._turns else None)
        self._stop_ids = frozenset((*(id_ for id_ in own if isinstance(id_, int)), *eos_token_ids))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an assistant turn: the end-of-sequence ids and the template's own end-of-turn id."""
        return self._stop_ids

    def plan(self, prompt: Prompt, context: Context | None = None) -> PromptPlan:
        """What to prefill for `prompt`, on top of `context` and of the contexts its messages stand for.

        Args:
            prompt: Messages, or text: one user message, or raw text where the tokenizer has no chat template. With
                `context`, no messages at all open a new assistant turn at once.
            context: A context to hand over explicitly.

        Raises:
            PromptError: The prompt is empty or malformed, or the template cannot render it.
        """
        if self._turns is None:
            return self._plan_raw(prompt, context)
        turns = read_messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        if not turns and context is None:
            raise PromptError("The prompt has no messages; pass at least one.")
        return self._plan_turns(self._turns, turns, context)

    def render(self, messages: Prompt) -> list[int]:
        """The ids of the whole prompt, contexts rendered as text, with the generation prompt open.

        Raises:
            PromptError: As for `plan`.
        """
        if self._turns is None or isinstance(messages, str):
            return list(self.plan(messages).token_ids)
        return list(self._turns.whole([turn.message for turn in read_messages(messages)]).token_ids)

    def count(self, prompt: Prompt) -> int:
        """Positions of the prompt, those of a context that it continues included.

        Raises:
            PromptError: As for `plan`.
        """
        return len(self.plan(prompt))

    def _plan_turns(self, renderer: TurnRenderer, turns: list[Turn], context: Context | None) -> PromptPlan:
        def rendering_of(line: Line) -> Rendering:
            messages = [turn.message for turn in line.pending]
            if line.base is None:
                return renderer.whole(messages)
            if not messages and isinstance(line.base.lineage[-1], LatentSegment):
                return Rendering((), ("nothing new to say: the thought's own turn goes on",))
            return renderer.appended(messages, turn_ended=self._ends_turn(line.base))

        line = LineageWalk(turns, lambda line: rendering_of(line).token_ids).follow(context)
        rendering = rendering_of(line)
        return PromptPlan(
            base=line.base,
            token_ids=rendering.token_ids,
            relation="fresh" if line.base is None else "continuation" if line.continues else "handoff",
            reuse=_longest_prefix(line.pending, rendering.token_ids) if line.base is None else None,
            notes=rendering.notes + _contexts_as_text(line),
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
        return PromptPlan(context, token_ids, "fresh" if context is None else "handoff")

    def _ends_turn(self, context: Context) -> bool:
        last = context.lineage[-1] if context.lineage else None
        return isinstance(last, TokenSegment) and not self._stop_ids.isdisjoint(last.token_ids[-1:])


def _longest_prefix(turns: tuple[Turn, ...], token_ids: tuple[int, ...]) -> Context | None:
    """The turns' context that agrees with the most leading ids, if one agrees with any."""
    contexts = [turn.context for turn in turns if turn.context is not None]
    best = max(contexts, key=lambda context: _agreement(context, token_ids), default=None)
    return best if best is not None and _agreement(best, token_ids) else None


def _agreement(context: Context, token_ids: tuple[int, ...]) -> int:
    """How many leading ids are the same."""
    pairs = zip(context.token_ids(), token_ids, strict=False)
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(context), len(token_ids)))


def _contexts_as_text(line: Line) -> tuple[str, ...]:
    """One note per context that the plan neither continues nor holds."""
    reason = "it was made from another prompt" if line.base is None else "the context that is used does not extend it"
    carrying = [turn for turn in line.pending if turn.context is not None]
    return tuple(f"context of message {turn.index} rendered as text: {reason}" for turn in carrying)
