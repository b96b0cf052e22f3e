"""Which context a conversation continues: the cases of the table in `avp_agents.prompt.continuation`."""

from __future__ import annotations

import pytest
from prompt_agents import NOTE, QUESTION, RESEARCHER, SOLVER, UNUSED, WHY, Agents, Messages, outcome, said
from prompt_tokenizers import chatml, id_of, llama_3, mistral

from avp_agents.context import Context, TokenSegment
from avp_agents.prompt.chat_template import Rendering, TurnRenderer


@pytest.fixture(scope="module", params=[chatml, llama_3], ids=["chatml", "llama_3"])
def agents(request: pytest.FixtureRequest) -> Agents:
    return Agents(request.param())


class TestContinuation:
    def test_the_same_agent_goes_on_from_its_thought(self, agents: Agents):
        thought = agents.think([SOLVER, QUESTION])
        plan = agents.plan([SOLVER, QUESTION, said(NOTE, thought), WHY])
        assert outcome(plan) == (thought, "continuation", ())
        assert plan.token_ids == agents.plan([WHY], thought).token_ids

    def test_sampled_ids_are_kept_though_the_text_encodes_otherwise(self, agents: Agents):
        answer = agents.answer([QUESTION], "hello")
        plan = agents.plan([QUESTION, said("hello", answer), WHY])
        assert outcome(plan) == (answer, "continuation", ())
        assert plan.base is not None
        assert (*answer.token_ids(), *plan.token_ids) != tuple(agents.renderer.render([QUESTION, said("hello"), WHY]))

    def test_turn_by_turn(self, agents: Agents):
        messages, answer = [SOLVER], None
        for turn in range(5):
            messages.append({"role": "user", "content": f"Question {turn}"})
            plan = agents.plan(messages)
            assert outcome(plan) == (answer, "continuation" if turn else "fresh", ())
            assert f"Question {turn - 1}" not in agents.text(plan)
            answer = agents.answer(messages, "hello", ended=turn % 2 == 0)
            messages.append(said("hello", answer))

    def test_with_nothing_after_a_thought_its_own_turn_goes_on(self, agents: Agents):
        thought = agents.think([QUESTION])
        plan = agents.plan([QUESTION, said(NOTE, thought)])
        assert (plan.base, plan.relation, plan.token_ids) == (thought, "continuation", ())
        assert plan.notes == agents.plan([], thought).notes == ("nothing new to say: the thought's own turn goes on",)

    def test_a_message_changed_in_between_ends_it(self, agents: Agents):
        first = agents.answer([QUESTION], "411")
        second = agents.answer([QUESTION, said("411", first), WHY], "Because.")
        edited = [QUESTION, said("411", first), {"role": "user", "content": "How?"}, said("Because.", second), WHY]
        plan = agents.plan(edited)
        assert outcome(plan) == (first, "continuation", (f"context of message 3 rendered as text: {UNUSED}",))
        assert "How?" in agents.text(plan)
        assert "Because." in agents.text(plan)

    def test_the_same_messages_on_another_lineage_do_not_continue(self, agents: Agents):
        own, other = agents.think([SOLVER, QUESTION]), agents.think([RESEARCHER, QUESTION])
        further = agents.think([WHY], other)
        plan = agents.plan([SOLVER, QUESTION, said(NOTE, own), WHY, said("Thought", further)])
        assert (plan.base, plan.relation) == (further, "handoff")

    def test_a_message_said_twice_is_held_already(self, agents: Agents):
        thought = agents.think([QUESTION])
        plan = agents.plan([QUESTION, said(NOTE, thought), said(NOTE, thought), WHY])
        assert outcome(plan) == (thought, "continuation", ())
        assert plan.token_ids == agents.plan([WHY], thought).token_ids


class TestHandoff:
    def test_another_agents_thought_stands_for_its_message(self, agents: Agents):
        thought = agents.think([RESEARCHER, QUESTION])
        plan = agents.plan([SOLVER, QUESTION, said(NOTE, thought), WHY])
        assert outcome(plan) == (thought, "handoff", ())
        assert plan.token_ids == agents.plan([SOLVER, QUESTION, WHY], thought).token_ids
        assert NOTE not in agents.text(plan)

    def test_the_solvers_next_turn_continues_its_own_context(self, agents: Agents):
        thought = agents.think([RESEARCHER, QUESTION])
        messages = [SOLVER, QUESTION, said(NOTE, thought)]
        answer = agents.answer(messages, "411")
        plan = agents.plan([*messages, said("411", answer), WHY])
        assert outcome(plan) == (answer, "continuation", ())
        assert plan.token_ids == agents.plan([WHY], answer).token_ids

    def test_a_thought_with_nothing_before_it(self, agents: Agents):
        thought = agents.think([RESEARCHER, QUESTION])
        plan = agents.plan([said(NOTE, thought), WHY])
        assert outcome(plan) == (thought, "handoff", ())
        assert plan.token_ids == agents.plan([WHY], thought).token_ids

    def test_of_two_unrelated_thoughts_the_last_is_the_base(self, agents: Agents):
        one = agents.think([RESEARCHER, QUESTION], steps=2)
        other = agents.think([{"role": "system", "content": "You are a critic."}, QUESTION], steps=3)
        plan = agents.plan([SOLVER, QUESTION, said(NOTE, one), said("Criticism", other), WHY])
        assert outcome(plan) == (other, "handoff", (f"context of message 2 rendered as text: {UNUSED}",))
        assert plan.token_ids == agents.plan([SOLVER, QUESTION, said(NOTE), WHY], other).token_ids

    def test_a_thought_without_a_text_is_left_out_where_another_is_the_base(self, agents: Agents):
        one = agents.think([RESEARCHER, QUESTION], steps=2)
        other = agents.think([RESEARCHER, WHY], steps=3)
        plan = agents.plan([SOLVER, said("", one), said("", other), WHY])
        assert outcome(plan) == (other, "handoff", (f"context of message 1 left out: {UNUSED}",))
        assert plan.token_ids == agents.plan([SOLVER, WHY], other).token_ids

    def test_a_thought_that_descends_from_an_earlier_one_holds_its_message(self, agents: Agents):
        one = agents.think([RESEARCHER, QUESTION])
        other = agents.think([{"role": "system", "content": "You are a critic."}], one)
        plan = agents.plan([SOLVER, QUESTION, said(NOTE, one), said("Criticism", other), WHY])
        assert outcome(plan) == (other, "handoff", ())
        assert plan.token_ids == agents.plan([SOLVER, QUESTION, WHY], other).token_ids

    def test_messages_that_an_earlier_base_holds_are_not_repeated(self, agents: Agents):
        """The second thought goes on from the first, which continues the conversation; only the edit is new."""
        first = agents.think([SOLVER, QUESTION])
        second = agents.think([WHY], first)
        how = {"role": "user", "content": "How?"}
        plan = agents.plan([SOLVER, QUESTION, said(NOTE, first), how, said("Thought", second), WHY])
        assert outcome(plan) == (second, "handoff", ())
        assert plan.token_ids == agents.plan([how, WHY], second).token_ids

    def test_the_last_of_parallel_thoughts_holds_what_they_share(self, agents: Agents):
        one, other = (agents.think([SOLVER, QUESTION], steps=steps) for steps in (2, 3))
        plan = agents.plan([SOLVER, QUESTION, said("one", one), said("other", other), WHY])
        assert outcome(plan) == (other, "handoff", (f"context of message 2 rendered as text: {UNUSED}",))
        assert plan.token_ids == agents.plan([said("one"), WHY], other).token_ids

    def test_any_role_may_carry_a_thought(self, agents: Agents):
        thought = agents.think([RESEARCHER, QUESTION])
        plan = agents.plan([QUESTION, {"role": "tool", "content": NOTE, "context": thought}, WHY])
        assert outcome(plan) == (thought, "handoff", ())
        assert NOTE not in agents.text(plan)


class TestWork:
    def test_another_agents_history_is_rendered_once_to_tell_that_it_is_not_continued(
        self, agents: Agents, monkeypatch: pytest.MonkeyPatch
    ):
        """However many of its answers carry contexts: they all begin alike."""
        theirs, messages = [RESEARCHER], [SOLVER]
        for turn in range(8):
            question = {"role": "user", "content": f"Question {turn}"}
            answer = said("hello", agents.answer([*theirs, question], "hello"))
            theirs, messages = [*theirs, question, answer], [*messages, question, answer]
        rendered: list[int] = []
        whole = TurnRenderer.whole

        def counted(renderer: TurnRenderer, turns: Messages) -> Rendering:
            rendered.append(len(turns))
            return whole(renderer, turns)

        monkeypatch.setattr(TurnRenderer, "whole", counted)
        agents.plan([*messages, WHY])
        assert rendered == [2, 18]


class TestTextOfOtherAgents:
    def test_it_is_rendered_and_its_kv_cache_is_a_plain_prefix(self, agents: Agents):
        answer = agents.answer([RESEARCHER, QUESTION], "hello")
        plan = agents.plan([SOLVER, QUESTION, said("hello", answer), WHY])
        note = "context of message 2 rendered as text: it was made from another prompt"
        assert outcome(plan) == (None, "fresh", (note,))
        assert list(plan.token_ids) == agents.renderer.render([SOLVER, QUESTION, said("hello"), WHY])
        assert plan.reuse is answer

    def test_the_context_that_agrees_most_is_reused(self, agents: Agents):
        far = agents.answer([QUESTION], "far")
        near = agents.answer([SOLVER, {"role": "user", "content": "What is 24?"}], "near")
        plan = agents.plan([SOLVER, QUESTION, said("far", far), said("near", near), WHY])
        assert plan.reuse is near

    def test_a_context_that_does_not_agree_at_all_is_not_reused(self, agents: Agents):
        alien = Context("f" * 64, "float32", (TokenSegment((5, 6, 7)),))
        assert agents.plan([QUESTION, said("hello", alien), WHY]).reuse is None

    def test_the_agents_own_answer_after_it_is_still_continued(self, agents: Agents):
        messages = [SOLVER, QUESTION, said("hello", agents.answer([RESEARCHER, QUESTION], "hello"))]
        own = agents.answer(messages, "411")
        plan = agents.plan([*messages, said("411", own), WHY])
        assert outcome(plan) == (own, "continuation", ())

    def test_before_another_agents_thought_it_is_rendered_behind_that(self, agents: Agents):
        own = agents.answer([SOLVER, QUESTION], "411")
        thought = agents.think([RESEARCHER, WHY])
        plan = agents.plan([SOLVER, QUESTION, said("411", own), WHY, said(NOTE, thought)])
        assert outcome(plan) == (thought, "handoff", (f"context of message 2 rendered as text: {UNUSED}",))
        assert plan.token_ids == agents.plan([SOLVER, QUESTION, said("411"), WHY], thought).token_ids


class TestExplicitContext:
    def test_it_is_a_handoff_even_of_text(self, agents: Agents):
        answer = agents.answer([QUESTION], "411")
        assert outcome(agents.plan([WHY], answer)) == (answer, "handoff", ())

    def test_messages_that_it_holds_are_not_rendered(self, agents: Agents):
        thought = agents.think([SOLVER, QUESTION])
        plan = agents.plan([SOLVER, QUESTION, said(NOTE, thought), WHY], thought)
        assert outcome(plan) == (thought, "continuation", ())
        assert plan.token_ids == agents.plan([WHY], thought).token_ids

    def test_messages_that_it_begins_with_are_not_repeated(self, agents: Agents):
        """Nothing tells that they belong together but their tokens: no message carries a context."""
        thought = agents.think([SOLVER, QUESTION])
        plan = agents.plan([SOLVER, QUESTION, WHY], thought)
        assert outcome(plan) == (thought, "continuation", ())
        assert plan.token_ids == agents.plan([WHY], thought).token_ids

        plan = agents.plan([SOLVER, QUESTION, said("Let me see."), WHY], thought)
        assert plan.token_ids == agents.plan([said("Let me see."), WHY], thought).token_ids

    def test_a_thought_about_the_whole_prompt_goes_on_in_its_own_turn(self, agents: Agents):
        thought = agents.think([SOLVER, QUESTION])
        plan = agents.plan([SOLVER, QUESTION], thought)
        assert outcome(plan) == (thought, "continuation", ("nothing new to say: the thought's own turn goes on",))
        assert plan.token_ids == ()

    def test_its_answer_takes_over_where_the_thought_is_given_again(self, agents: Agents):
        """As in a graph whose state keeps the thought in a channel of its own, and the answers among the messages."""
        thought = agents.think([QUESTION])
        answer = agents.answer([QUESTION], "411", thought)
        plan = agents.plan([QUESTION, said("411", answer), WHY], thought)
        assert outcome(plan) == (answer, "continuation", ())
        assert plan.token_ids == agents.plan([WHY], answer).token_ids

    def test_a_later_thought_holds_the_conversation_before_it(self, agents: Agents):
        answer = agents.answer([QUESTION], "411")
        messages = [QUESTION, said("411", answer), WHY]
        thought = agents.think(messages)
        brief = {"role": "user", "content": "Be brief."}
        plan = agents.plan([*messages, brief], thought)
        assert outcome(plan) == (thought, "continuation", ())
        assert plan.token_ids == agents.plan([brief], thought).token_ids
        assert agents.plan(messages, thought).token_ids == ()

    def test_a_question_that_its_answer_is_given_for_is_asked_again(self, agents: Agents):
        """There would be nothing to answer else."""
        answer = agents.answer([QUESTION], "411")
        assert QUESTION["content"] in agents.text(agents.plan([QUESTION], answer))

    def test_what_it_begins_with_is_found_in_few_renderings(self, agents: Agents, monkeypatch: pytest.MonkeyPatch):
        messages = [{"role": role, "content": f"{role} {turn}"} for turn in range(32) for role in ("user", "assistant")]
        thought = agents.think(messages[:41])
        rendered: list[int] = []
        whole = TurnRenderer.whole

        def counted(renderer: TurnRenderer, turns: Messages) -> Rendering:
            rendered.append(len(turns))
            return whole(renderer, turns)

        monkeypatch.setattr(TurnRenderer, "whole", counted)
        assert agents.plan(messages, thought).token_ids == agents.plan(messages[41:], thought).token_ids
        assert len(rendered) < len(messages) / 4

    def test_a_conversation_without_handles_is_found_in_it_by_its_tokens(self, agents: Agents):
        start = agents.plan([SOLVER, QUESTION])
        reply = agents.tokenizer.encode("hello", add_special_tokens=False)
        end = id_of(agents.tokenizer, "<|im_end|>" if "<|im_end|>" in agents.text(start) else "<|eot_id|>")
        answer = Context("f" * 64, "float32", (TokenSegment(start.token_ids), TokenSegment((*reply, end))))
        messages = [SOLVER, QUESTION, said("hello"), WHY]
        plan = agents.plan(messages, answer)
        assert outcome(plan) == (answer, "continuation", ())
        assert [*answer.token_ids(), *plan.token_ids] == agents.renderer.render(messages)

    def test_it_goes_before_the_contexts_of_messages(self, agents: Agents):
        thought = agents.think([RESEARCHER, QUESTION])
        own = agents.think([SOLVER, QUESTION])
        plan = agents.plan([SOLVER, QUESTION, said("Mine", own), WHY], thought)
        assert outcome(plan) == (thought, "handoff", (f"context of message 2 rendered as text: {UNUSED}",))
        assert plan.token_ids == agents.plan([SOLVER, QUESTION, said("Mine"), WHY], thought).token_ids

    def test_a_context_made_on_top_of_it_takes_over(self, agents: Agents):
        thought = agents.think([RESEARCHER, QUESTION])
        answer = agents.answer([SOLVER, QUESTION], "411", thought)
        plan = agents.plan([SOLVER, QUESTION, said("411", answer), WHY], thought)
        assert outcome(plan) == (answer, "continuation", ())
        assert plan.token_ids == agents.plan([WHY], answer).token_ids


class TestStrictTemplates:
    def test_a_prefix_that_cannot_be_rendered_is_not_continued(self):
        """Mistral's template opens no turn right behind an answer; the whole prompt is fine."""
        agents = Agents(mistral())
        one = agents.think([QUESTION])
        other = agents.think([{"role": "user", "content": "How?"}], one)
        plan = agents.plan([QUESTION, said("one", one), said("other", other), WHY])
        assert outcome(plan) == (other, "handoff", ())
        assert agents.text(plan) == "</s>[INST] Why? [/INST]"

    def test_a_sibling_is_told_by_the_user_where_answers_must_alternate(self):
        agents = Agents(mistral())
        one, other = (agents.think([QUESTION], steps=steps) for steps in (2, 3))
        plan = agents.plan([QUESTION, said("one", one), said("other", other), WHY])
        assert (plan.base, plan.relation) == (other, "handoff")
        assert agents.text(plan) == "</s>[INST] assistant: one\n\nWhy? [/INST]"
