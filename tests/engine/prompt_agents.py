"""Agents for the prompt tests: a renderer, and what an engine would make of its plans."""

from __future__ import annotations

from typing import Any

import torch
from prompt_tokenizers import text_of
from transformers import PreTrainedTokenizerFast

from avp_agents.context import Context, LatentRecipe, LatentSegment, TokenSegment
from avp_agents.prompt.plan import PromptPlan, PromptRenderer

RECIPE = LatentRecipe("soft", 256, 1.0, False, 2)
RESEARCHER = {"role": "system", "content": "You are a researcher."}
SOLVER = {"role": "system", "content": "You are a solver."}
QUESTION = {"role": "user", "content": "What is 24 * 17 + 3?"}
WHY = {"role": "user", "content": "Why?"}
NOTE = "What the researcher found"
UNUSED = "the context that is used does not extend it"

Messages = list[dict[str, Any]]


class Agents:
    """A renderer, and what an engine makes of its plans: contexts without numbers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, **chat_template_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.renderer = PromptRenderer(tokenizer, chat_template_kwargs=chat_template_kwargs)

    def plan(self, messages: Messages, context: Context | None = None) -> PromptPlan:
        return self.renderer.plan(messages, context)

    def text(self, plan: PromptPlan) -> str:
        return text_of(self.tokenizer, plan.token_ids)

    def think(self, messages: Messages, context: Context | None = None, steps: int = 2) -> Context:
        """Latent steps behind the prompt; the number of steps tells two thoughts apart."""
        return self._made(messages, context, LatentSegment(torch.zeros(steps, 4), RECIPE))

    def answer(self, messages: Messages, text: str, context: Context | None = None, *, ended: bool = True) -> Context:
        """An answer behind the prompt, one id per byte: sampled ids need not be those that its text encodes to."""
        ids = [id_ for letter in text for id_ in self.tokenizer.encode(letter, add_special_tokens=False)]
        end = [min(self.renderer.stop_ids)] if ended else []
        return self._made(messages, context, TokenSegment((*ids, *end)))

    def _made(self, messages: Messages, context: Context | None, made: TokenSegment | LatentSegment) -> Context:
        plan = self.plan(messages, context)
        before = plan.base.lineage if plan.base else ()
        prompt = [TokenSegment(plan.token_ids)] if plan.token_ids else []
        return Context("f" * 64, "float32", (*before, *prompt, made))


def said(text: str, context: Context | None = None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "context": context, **keys}


def outcome(plan: PromptPlan) -> tuple[Context | None, str, tuple[str, ...]]:
    return plan.base, plan.relation, plan.notes
