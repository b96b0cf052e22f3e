"""Formats of tool calls are read off chat templates, and tools are shown where a template cannot show them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prompt_tokenizers import byte_tokenizer, chatml, deepseek, gemma

from avp_agents import Context, TokenSegment
from avp_agents.answer.tool_format import GENERIC
from avp_agents.errors import ConfigurationError
from avp_agents.prompt.plan import PromptRenderer

WITH_TOOLS = """\
{% if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.tool_calls %}<|im_start|>assistant{% if message.content %}{{ '\n' + message.content }}{% endif %}\
{% for call in message.tool_calls %}{{ '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}\
{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}<|im_end|>
{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Text, and any number of calls behind it (Qwen2.5)."""

ONE_CALL = """\
{% for message in messages %}{% if message.tool_calls and message.tool_calls | length > 1 %}\
{{ raise_exception('only one call') }}{% endif %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% if message.tool_calls %}{% set call = message.tool_calls[0].function %}\
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}{% else %}{{ message.content }}{% endif %}\
<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
"""One call, without text (Llama 3.1)."""

WITH_IDS = WITH_TOOLS.replace("'}\n</tool_call>'", """', "id": "' + call.id + '"}\n</tool_call>'""")
"""Calls have ids that the model would have to make up (Mistral)."""

TOOL = {"type": "function", "function": {"name": "f", "description": "Does <|im_end|> it.", "parameters": {}}}
CALLS = [
    {"type": "function", "id": f"call_{i}", "function": {"name": name, "arguments": {"x": [1, "ü"]}}}
    for i, name in enumerate("fg")
]
QUESTION = {"role": "user", "content": "Do it."}
RESULTS = [{"role": "tool", "tool_call_id": f"call_{i}", "name": name, "content": "ok"} for i, name in enumerate("fg")]


def llama_3_1() -> Any:
    special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_tokenizer(ONE_CALL, special=special, eos="<|end_of_text|>")


def decoded(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


class TestReading:
    def test_text_and_several_calls(self) -> None:
        tool_format = PromptRenderer(chatml(WITH_TOOLS)).tool_format

        assert tool_format.is_native
        assert tool_format.begin.text == '<tool_call>\n{"name": "'
        assert tool_format.middle.text == '", "arguments": '
        assert tool_format.end.text == "}\n</tool_call>"
        assert tool_format.between is not None
        assert tool_format.between.text == '}\n</tool_call>\n<tool_call>\n{"name": "'
        assert tool_format.joint == "\n"

    def test_control_tokens_are_named_by_their_ids(self) -> None:
        tokenizer = chatml(WITH_TOOLS)
        opening, closing = (tokenizer.convert_tokens_to_ids(tag) for tag in ("<tool_call>", "</tool_call>"))

        tool_format = PromptRenderer(tokenizer).tool_format

        assert tool_format.begin.lark.startswith(f"<[{opening}]> ")
        assert tool_format.end.lark.endswith(f" <[{closing}]>")

    def test_one_call_without_text(self) -> None:
        tool_format = PromptRenderer(llama_3_1()).tool_format

        assert (tool_format.is_native, tool_format.between, tool_format.joint) == (True, None, None)
        assert tool_format.begin.text == '{"name": "'
        assert tool_format.middle.text == '", "parameters": '
        assert tool_format.end.text == "}"

    @pytest.mark.parametrize("tokenizer", [chatml(), chatml(WITH_IDS), gemma(), deepseek(), byte_tokenizer()])
    def test_templates_without_one_get_the_generic_format(self, tokenizer: Any) -> None:
        assert PromptRenderer(tokenizer).tool_format is GENERIC

    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("text", ["", "Let me see."])
    @pytest.mark.parametrize("template", [WITH_TOOLS, None])
    def test_what_a_model_wrote_is_rendered_as_it_was_written(
        self, template: str | None, text: str, count: int
    ) -> None:
        """So the ids of the next turn begin with those of this one, and its KV-cache serves."""
        tokenizer: Any = chatml(template) if template else chatml()
        renderer = PromptRenderer(tokenizer)
        tool_format, calls = renderer.tool_format, CALLS[:count]
        functions = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        joint = tool_format.joint if text else ""
        answer = f"{text}{joint}{tool_format.calls_text(functions)}"
        opened = renderer.plan([QUESTION], tools=[TOOL]).token_ids
        # the generic format is plain text, like every content; a native one has its control tokens
        spelled = tokenizer.encode(answer) if tool_format.is_native else renderer.encode(answer)

        message = {"role": "assistant", "content": text, "tool_calls": calls}
        again = renderer.plan([QUESTION, message, *RESULTS[:count]], tools=[TOOL]).token_ids

        assert again[: len(opened) + len(spelled)] == (*opened, *spelled)


class TestShowing:
    def test_a_template_shows_its_tools_itself(self) -> None:
        tokenizer = chatml(WITH_TOOLS)
        text = decoded(tokenizer, PromptRenderer(tokenizer).plan([QUESTION], tools=[TOOL]).token_ids)
        assert text.startswith('<|im_start|>system\n# Tools\n{"type": "function", "function": {"name": "f"')

    @pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
    def test_else_they_stand_in_the_system_message(self, system: list[Any]) -> None:
        tokenizer = chatml()
        text = decoded(tokenizer, PromptRenderer(tokenizer).plan([*system, QUESTION], tools=[TOOL]).token_ids)

        said = "Be brief.\n\n" if system else ""
        assert text.startswith(f"<|im_start|>system\n{said}# Tools\n\nYou may call functions")
        assert json.dumps(TOOL) in text
        assert text.count("<|im_start|>system") == 1

    def test_a_description_is_data(self) -> None:
        tokenizer = chatml(WITH_TOOLS)
        renderer = PromptRenderer(tokenizer)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        ids = renderer.plan([QUESTION], tools=[TOOL]).token_ids
        assert ids.count(end) == 2

    def test_a_context_that_did_not_show_them_is_followed_by_them(self) -> None:
        renderer = PromptRenderer(chatml(WITH_TOOLS))
        context = Context("model", "float32", (TokenSegment(renderer.plan("Something else").token_ids),))

        text = decoded(chatml(WITH_TOOLS), renderer.plan([QUESTION], context, tools=[TOOL]).token_ids)

        assert "# Tools" in text
        assert '<tool_call>\n{"name": "<function name>", "arguments": <arguments as a JSON object>}' in text

    def test_a_conversation_shows_them_once(self) -> None:
        renderer = PromptRenderer(chatml(WITH_TOOLS))
        opened = renderer.plan([QUESTION], tools=[TOOL]).token_ids
        answered = Context("model", "float32", (TokenSegment(opened), TokenSegment(tuple(renderer.encode("Yes.")))))
        answer = {"role": "assistant", "content": "Yes.", "context": answered}

        plan = renderer.plan([QUESTION, answer, QUESTION], tools=[TOOL])

        assert plan.base is answered
        assert "Tools" not in decoded(chatml(WITH_TOOLS), plan.token_ids)

    def test_they_count(self) -> None:
        renderer = PromptRenderer(chatml())
        assert renderer.count([QUESTION], tools=[TOOL]) > renderer.count([QUESTION]) + 100

    def test_without_a_template_there_is_no_way_to_show_them(self) -> None:
        with pytest.raises(ConfigurationError, match="no chat template"):
            PromptRenderer(byte_tokenizer()).plan("Do it.", tools=[TOOL])
