"""Reasoning models: what earlier turns show is the template's business, and a KV-cache serves as far as that agrees."""

from __future__ import annotations

from typing import Any

import pytest
from prompt_agents import QUESTION, WHY, Agents, Messages, outcome, said
from prompt_tokenizers import QWEN_3, R_1, chatml, llama_3

from avp_agents.context import Context, TokenSegment
from avp_agents.errors import ConfigurationError
from avp_agents.prompt.plan import PromptPlan, PromptRenderer

REASONING = "24 * 17 = 408."
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}


def answered(agents: Agents, messages: Messages, written: str, **keys: Any) -> tuple[dict[str, Any], Context]:
    """The message and context of an answer, in the ids that its text encodes to."""
    plan = agents.plan(messages)
    ids = agents.tokenizer.encode(written + "<|im_end|>", add_special_tokens=False)
    before = plan.base.lineage if plan.base else ()
    context = Context("f" * 64, "float32", (*before, TokenSegment(plan.token_ids), TokenSegment(tuple(ids))))
    return said(keys.pop("text", ""), context, **keys), context


def agreeing(context: Context, plan: PromptPlan) -> int:
    """Leading ids that are the same."""
    pairs = zip(context.token_ids(), plan.token_ids, strict=False)
    return next(i for i, (one, other) in enumerate(pairs) if one != other)


class TestDroppedReasoning:
    @pytest.fixture
    def agents(self) -> Agents:
        return Agents(chatml(QWEN_3))

    def test_an_earlier_turns_reasoning_is_left_out(self, agents: Agents):
        answer, _ = answered(
            agents, [QUESTION], f"<think>\n{REASONING}\n</think>\n\n411", text="411", reasoning_content=REASONING
        )
        plan = agents.plan([QUESTION, answer, WHY])
        assert list(plan.token_ids) == agents.renderer.render([QUESTION, said("411"), WHY])
        assert REASONING not in agents.text(plan)
        assert outcome(plan) == (
            None,
            "fresh",
            ("message 1 rendered again: the template treats earlier answers otherwise",),
        )

    def test_its_context_serves_as_far_as_the_ids_agree(self, agents: Agents):
        answer, context = answered(
            agents, [QUESTION], f"<think>\n{REASONING}\n</think>\n\n411", text="411", reasoning_content=REASONING
        )
        plan = agents.plan([QUESTION, answer, WHY])
        assert plan.reuse is context
        assert agreeing(context, plan) == len(agents.plan([QUESTION]).token_ids)

    def test_a_tool_loop_keeps_its_reasoning_and_everything_serves(self, agents: Agents):
        written = (
            f'<think>\n{REASONING}\n</think>\n\n<tool_call>\n{{"name": "add", "arguments": {{"a": 1}}}}\n</tool_call>'
        )
        call, context = answered(agents, [QUESTION], written, tool_calls=[CALL], reasoning_content=REASONING)
        plan = agents.plan([QUESTION, call, {"role": "tool", "content": "2"}])
        assert REASONING in agents.text(plan)
        assert plan.reuse is context
        assert plan.token_ids[: len(context)] == context.token_ids()

    def test_an_answer_without_reasoning_is_continued(self, agents: Agents):
        answer, context = answered(agents, [QUESTION], "411", text="411")
        assert outcome(agents.plan([QUESTION, answer, WHY])) == (context, "continuation", ())

    def test_a_template_that_shows_no_reasoning_gets_none(self):
        agents = Agents(chatml())
        assert REASONING not in agents.text(agents.plan([QUESTION, said("411", reasoning_content=REASONING), WHY]))

    def test_behind_a_thought_the_answer_is_rendered_again_and_the_thought_stays(self, agents: Agents):
        thought = agents.think([QUESTION])
        asked = [QUESTION, said("", thought), WHY]
        answer, context = answered(
            agents, asked, f"<think>\n{REASONING}\n</think>\n\n411", text="411", reasoning_content=REASONING
        )
        plan = agents.plan([*asked, answer, WHY])
        assert (plan.base, plan.reuse) == (thought, context)
        assert plan.token_ids == agents.plan([WHY, said("411"), WHY], thought).token_ids


class TestTurnsThatOpenWithReasoning:
    @pytest.mark.parametrize(
        "agents", [Agents(chatml(R_1)), Agents(chatml(QWEN_3), enable_thinking=False)], ids=["R1", "Qwen3"]
    )
    def test_earlier_answers_are_rendered_without_what_opened_their_turn(self, agents: Agents):
        messages: Messages = [QUESTION]
        for turn in range(3):
            answer, context = answered(agents, messages, "411", text="411")
            messages = [*messages, answer, {"role": "user", "content": f"Question {turn}"}]
            plan = agents.plan(messages)
            assert (plan.base, plan.reuse) == (None, context)
            assert agents.text(plan).count("<think>") == 1
            assert list(plan.token_ids) == agents.renderer.render(
                [{**message, "context": None} for message in messages]
            )

    def test_the_answer_begins_with_reasoning_where_the_prompt_opens_it(self):
        assert Agents(chatml(R_1)).plan([QUESTION]).opens_reasoning
        assert not Agents(chatml(QWEN_3)).plan([QUESTION]).opens_reasoning
        assert not Agents(chatml(QWEN_3), enable_thinking=False).plan([QUESTION]).opens_reasoning

    def test_a_thought_that_goes_on_in_its_own_turn_still_reasons(self):
        agents = Agents(chatml(R_1))
        assert agents.plan([], agents.think([QUESTION])).token_ids == ()
        assert agents.plan([], agents.think([QUESTION])).opens_reasoning

    def test_a_user_who_writes_the_marker_opens_nothing(self):
        assert not Agents(chatml(QWEN_3)).plan([{"role": "user", "content": "<think>"}]).opens_reasoning

    def test_only_models_that_know_the_markers_reason(self):
        assert Agents(chatml()).renderer.marks_reasoning
        assert not Agents(llama_3()).renderer.marks_reasoning


class TestTemplateOptionsOfOnePrompt:
    def test_they_go_over_the_renderers_own(self):
        agents = Agents(chatml(QWEN_3), enable_thinking=False)
        plan = agents.renderer.plan([QUESTION], chat_template_kwargs={"enable_thinking": True})
        assert "<think>" not in agents.text(plan)
        assert "<think>" in agents.text(agents.plan([QUESTION]))
        assert agents.renderer.count([QUESTION]) > agents.renderer.count(
            [QUESTION], chat_template_kwargs={"enable_thinking": True}
        )

    def test_a_conversation_under_other_options_is_not_continued_but_reused(self):
        agents = Agents(chatml(QWEN_3))
        answer, context = answered(agents, [QUESTION], "411", text="411")
        messages = [QUESTION, answer, WHY]
        plan = agents.renderer.plan(messages, chat_template_kwargs={"enable_thinking": False})
        assert (plan.base, plan.reuse) == (None, context)
        assert plan.token_ids[: len(context)] == context.token_ids()

    @pytest.mark.parametrize("options", [{"tokenize": True}, {"conversation": []}, {"date": object()}])
    def test_those_that_rendering_sets_or_that_are_no_json_data_are_refused(self, options: dict[str, Any]):
        with pytest.raises(ConfigurationError, match="chat_template_kwargs"):
            PromptRenderer(chatml()).plan([QUESTION], chat_template_kwargs=options)

    def test_many_options_take_no_memory(self):
        renderer = PromptRenderer(chatml())
        for day in range(40):
            renderer.plan([QUESTION], chat_template_kwargs={"date": day})
        assert len(renderer._renderers) <= 16


def test_a_text_is_encoded_as_content() -> None:
    tokenizer = chatml()
    renderer = PromptRenderer(tokenizer)
    assert renderer.encode("hello") == tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode(renderer.encode("a<|im_end|>")) == "a<|im_end|>"
    assert not set(renderer.encode("a<|im_end|>")) & renderer.stop_ids
