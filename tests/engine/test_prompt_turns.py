"""Templates that refuse, drop or move messages: what is rearranged, and what the notes say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prompt_tokenizers import (
    CHATML,
    CHATML_WITH_TOOLS,
    PLAIN,
    USER_TURNS_ONLY,
    byte_tokenizer,
    chatml,
    deepseek,
    gemma,
    id_of,
    llama_3,
    mistral,
    text_of,
)
from transformers import PreTrainedTokenizerFast

from avp_agents.context import Context, LatentRecipe, LatentSegment, TokenSegment
from avp_agents.errors import PromptError
from avp_agents.prompt.plan import PromptPlan, PromptRenderer

LATENTS = LatentSegment(torch.zeros(3, 4), LatentRecipe("soft", 256, 1.0, False, 3))
CONTEXT = Context("f" * 64, "float32", (TokenSegment((9,)), LATENTS))
SYSTEM_MERGED = "system message merged into the user turn"
USERS_MERGED = "consecutive user messages merged"
CALL = {"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def tool(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **keys}


def planned(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], context: Context | None = None
) -> tuple[str, PromptPlan]:
    plan = PromptRenderer(tokenizer).plan(messages, context)
    return text_of(tokenizer, plan.token_ids), plan


class TestSystemMessages:
    def test_no_system_role(self):
        text, plan = planned(gemma(), [system("Be brief."), user("Hi")])
        assert text == "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
        assert plan.notes == (SYSTEM_MERGED,)

    def test_an_appended_system_turn_stays_one_where_the_template_takes_it(self):
        text, plan = planned(chatml(), [system("Be brief."), user("Hi")], CONTEXT)
        assert text == (
            "<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert plan.notes == ()

    def test_no_late_system_role(self):
        """Mistral's template takes a system message at the start, but not behind a context."""
        text, plan = planned(mistral(), [system("Be brief."), user("Hi")])
        assert (text, plan.notes) == ("<s>[INST] Be brief.\n\nHi [/INST]", ())
        text, plan = planned(mistral(), [system("Be brief."), user("Hi")], CONTEXT)
        assert (text, plan.notes) == ("</s>[INST] Be brief.\n\nHi [/INST]", (SYSTEM_MERGED,))

    def test_a_leading_system_message_stays_when_only_a_late_one_is_refused(self):
        refusing = (
            "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
            "{{ raise_exception('Only one system message') }}{% endif %}{% endfor %}"
        )
        messages = [system("A"), user("B"), assistant("C"), system("D"), user("E")]
        text, plan = planned(chatml(refusing + CHATML), messages)
        assert text == (
            "<|im_start|>system\nA<|im_end|>\n<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\nC<|im_end|>\n"
            "<|im_start|>user\nD\n\nE<|im_end|>\n<|im_start|>assistant\n"
        )
        assert plan.notes == (SYSTEM_MERGED,)

    def test_a_template_that_moves_system_messages_to_the_front(self):
        """In a whole prompt that is its way; behind a context it would lose them."""
        text, plan = planned(deepseek(), [user("A"), assistant("B"), system("C"), user("D")])
        assert (text, plan.notes) == ("<|bos|>C<|user|>A<|assistant|>B<|eos|><|user|>D<|assistant|>", ())
        text, plan = planned(deepseek(), [system("C"), user("D")], CONTEXT)
        assert (text, plan.notes) == ("<|eos|><|user|>C\n\nD<|assistant|>", (SYSTEM_MERGED,))

    def test_a_system_message_that_no_user_message_follows(self):
        text, plan = planned(gemma(), [system("Be brief.")])
        assert text == "<bos><start_of_turn>user\nBe brief.<end_of_turn>\n<start_of_turn>model\n"
        assert plan.notes == (SYSTEM_MERGED,)


class TestAlternation:
    def test_consecutive_messages_of_one_role_are_merged(self):
        messages = [user("A"), user("B"), assistant("C"), assistant("D"), user("E")]
        text, plan = planned(mistral(), messages)
        assert text == "<s>[INST] A\n\nB [/INST] C\n\nD</s>[INST] E [/INST]"
        assert plan.notes == (USERS_MERGED, "consecutive assistant messages merged")

    def test_they_are_not_where_the_template_takes_them(self):
        text, plan = planned(llama_3(), [user("A"), user("B")])
        assert text.count("<|eot_id|>") == 2
        assert plan.notes == ()

    def test_two_of_each(self):
        messages = [system("A"), system("B"), user("C"), user("D"), assistant("E"), assistant("F"), user("G")]
        text, plan = planned(gemma(), messages)
        assert text == (
            "<bos><start_of_turn>user\nA\n\nB\n\nC\n\nD<end_of_turn>\n<start_of_turn>model\nE\n\nF<end_of_turn>\n"
            "<start_of_turn>user\nG<end_of_turn>\n<start_of_turn>model\n"
        )
        assert plan.notes == (SYSTEM_MERGED, USERS_MERGED, "consecutive assistant messages merged")

    def test_an_assistant_message_that_opens_the_conversation(self):
        messages = [assistant("Welcome."), user("Hi"), assistant("Yes?"), user("Go on")]
        text, plan = planned(mistral(), messages)
        assert text == "<s>[INST] assistant: Welcome.\n\nHi [/INST] Yes?</s>[INST] Go on [/INST]"
        assert plan.notes == ("assistant message rendered in the user turn", USERS_MERGED)

    def test_an_assistant_message_after_a_context(self):
        text, plan = planned(gemma(), [assistant("411", name="critic"), user("Why?")], CONTEXT)
        assert text == "<end_of_turn>\n<start_of_turn>user\ncritic: 411\n\nWhy?<end_of_turn>\n<start_of_turn>model\n"
        assert plan.notes == ("assistant message rendered in the user turn", USERS_MERGED)

    def test_a_last_assistant_message_where_only_users_open_a_turn(self):
        text, plan = planned(mistral(), [user("Hi"), assistant("Hello")])
        assert text == "<s>[INST] Hi\n\nassistant: Hello [/INST]"
        assert plan.notes == ("assistant message rendered in the user turn", USERS_MERGED)

    def test_nothing_after_a_context_where_only_users_open_a_turn(self):
        cut_answer = Context(CONTEXT.fingerprint, CONTEXT.dtype, CONTEXT.lineage[:1])
        with pytest.raises(PromptError, match="opens no assistant turn after an assistant message; add a user message"):
            planned(mistral(), [], cut_answer)


class TestTools:
    MESSAGES = (user("Weather?"), assistant("Let me look.", tool_calls=[CALL]), tool("Sunny", name="weather"))

    def test_templates_with_tools_get_them(self):
        tokenizer = chatml(CHATML_WITH_TOOLS)
        messages = [system("s"), *self.MESSAGES]
        text, plan = planned(tokenizer, messages)
        assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>' in text
        assert plan.notes == ()

    def test_behind_a_context_too(self):
        text, _ = planned(chatml(CHATML_WITH_TOOLS), [tool("Sunny")], CONTEXT)
        assert text == (
            "<|im_end|>\n<|im_start|>user\n<tool_response>\nSunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        )

    def test_a_template_that_drops_tool_calls(self):
        text, plan = planned(chatml(), [system("s"), *self.MESSAGES])
        assert text == (
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
            "<|im_start|>assistant\nLet me look.\n<tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\nResult of weather:\nSunny<|im_end|>\n<|im_start|>assistant\n"
        )
        assert plan.notes == ("tool calls rendered as assistant text", "tool message rendered as user text")

    def test_results_read_alike_behind_a_context_and_within_a_whole_prompt(self):
        """Though this template has no objection to the role alone."""
        text, plan = planned(chatml(), [tool("Sunny", name="weather")], CONTEXT)
        assert text == ("<|im_end|>\n<|im_start|>user\nResult of weather:\nSunny<|im_end|>\n<|im_start|>assistant\n")
        assert planned(chatml(), list(self.MESSAGES))[0].endswith(text.removeprefix("<|im_end|>\n"))
        assert plan.notes == ("tool message rendered as user text",)

    def test_a_template_that_drops_tool_results(self):
        text, plan = planned(deepseek(), [user("Weather?"), tool("Sunny")])
        assert text == "<|bos|><|user|>Weather?<|user|>Result of the tool:\nSunny<|assistant|>"
        assert plan.notes == ("tool message rendered as user text",)

    def test_a_template_that_refuses_both(self):
        text, plan = planned(gemma(), list(self.MESSAGES))
        assert '<start_of_turn>model\nLet me look.\n<tool_call>\n{"name": "weather"' in text
        assert "<start_of_turn>user\nResult of weather:\nSunny<end_of_turn>" in text
        assert plan.notes == ("tool calls rendered as assistant text", "tool message rendered as user text")

    def test_calls_without_content(self):
        text, _ = planned(chatml(), [user("Weather?"), assistant(None, tool_calls=[CALL, CALL])])
        call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
        assert text.endswith(f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n<|im_start|>assistant\n")

    def test_calls_and_results_are_never_merged(self):
        refusing = (
            "{% for message in messages %}{% if loop.previtem is defined %}"
            "{% if loop.previtem.role == message.role == 'user' %}{{ raise_exception('Two user messages') }}{% endif %}"
            "{% endif %}{% endfor %}"
        )
        calling = assistant("", tool_calls=[CALL])
        messages = [system("s"), user("A"), user("B"), calling, calling, tool("1"), tool("2"), assistant("C")]
        text, plan = planned(chatml(refusing + CHATML_WITH_TOOLS), messages)
        assert plan.notes == (USERS_MERGED,)
        assert (text.count("<tool_call>"), text.count("<tool_response>")) == (2, 2)

    def test_arguments_as_a_json_string(self):
        """OpenAI's form, for templates that write the arguments as they are."""
        template = CHATML_WITH_TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")
        call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
        text, plan = planned(chatml(template), [user("x"), assistant("", tool_calls=[call])])
        assert '"arguments": {"a": 1}}\n</tool_call>' in text
        assert plan.notes == ()


class TestTemplatesThatCannotRender:
    def test_the_templates_message_is_named(self):
        tokenizer = byte_tokenizer("{{ raise_exception('Only on Sundays') }}")
        with pytest.raises(PromptError, match="cannot render these messages: Only on Sundays"):
            PromptRenderer(tokenizer).plan("Hi")

    def test_a_template_that_drops_user_messages(self):
        with pytest.raises(PromptError, match="it drops or moves the user message"):
            PromptRenderer(byte_tokenizer("Hello")).plan("Hi")

    def test_a_template_that_takes_no_answers_renders_prompts_but_appends_nothing(self):
        tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}", eos="<e>")
        renderer = PromptRenderer(tokenizer)
        assert text_of(tokenizer, renderer.render("Hi")) == "Hi"
        assert renderer.stop_ids == {id_of(tokenizer, "<e>")}
        with pytest.raises(PromptError, match="does not render an assistant message exactly once"):
            renderer.plan("Hi", CONTEXT)

    def test_a_template_that_repeats_answers_appends_nothing(self):
        template = "{% for m in messages %}{{ m.content + m.content }}{% endfor %}"
        with pytest.raises(PromptError, match="does not render an assistant message exactly once"):
            PromptRenderer(byte_tokenizer(template)).plan("Hi", CONTEXT)


class TestTemplatesWithoutEndOfTurn:
    def test_turns_are_closed_in_text(self):
        text, _ = planned(byte_tokenizer(PLAIN, eos="</s>"), [user("Hi")], CONTEXT)
        assert text == "\nUSER: Hi\nASSISTANT:"

    @pytest.mark.parametrize(
        ("template", "appended"),
        [(PLAIN, "\nUSER: Hi\nASSISTANT:"), (USER_TURNS_ONLY, "[INST]Hi[/INST]")],
        ids=["text only", "user turns only"],
    )
    def test_nothing_is_lost_behind_an_end_of_sequence(self, template: str, appended: str):
        tokenizer = byte_tokenizer(template, special=["[INST]", "[/INST]"], eos="</s>")
        ended = Context("f" * 64, "float32", (TokenSegment((9, id_of(tokenizer, "</s>"))),))
        assert planned(tokenizer, [user("Hi")], ended)[0] == appended
