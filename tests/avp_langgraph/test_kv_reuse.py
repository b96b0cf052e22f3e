"""Conversations and tool loops on the default model: every turn computes what is new, and says what it would anyway.

float32, greedy and batch invariant, so that an answer does not depend on what was computed in one piece with what. The
run to compare with gets the same messages without their handles.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from transformers import AutoTokenizer

from avp_agents import LatentEngine, MemoryStore, Namespace
from avp_agents.engine.extras.invariant import INVARIANT_CHUNK
from avp_langgraph import AvpChatModel

TOKENS = 3
QUESTIONS = [
    "Name a river.", "Where is it?", "How long?", "Name a town there.", "And a bridge?", "Who built it?", "When?",
    "Of what?", "Is it red?", "Thank you.",
]  # fmt: skip
BOUNDARY = 14
"""Most tokens of a new turn that are neither the question nor the tool's result: ends and beginnings of turns, and the
last token of the answer before, which was never fed."""

TEMPLATE = (
    "{% for message in messages %}{% set content = message.content.split('</think>')[-1] %}"
    "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('<think>\n' if reasons else '') }}{% endif %}"
)
"""The default model's, with an option: turns open with reasoning, which earlier turns do not show (DeepSeek-R1)."""


@pytest.fixture(scope="module")
def engine(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LatentEngine]:
    folder = tmp_path_factory.mktemp("smollm2")
    for file in smollm2_path.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    store = MemoryStore(namespace=Namespace("reuse", b"k" * 32))
    options = {"dtype": "float32", "device": "cpu", "kv_pool_bytes": 256 * 2**20, "batch_invariant": True}
    with LatentEngine.from_pretrained(str(folder), store=store, **options) as engine:
        yield engine


@pytest.fixture
def model(engine: LatentEngine) -> AvpChatModel:
    return AvpChatModel(engine=engine, max_tokens=TOKENS)


def prefilled(answer: AIMessage) -> int:
    assert answer.usage_metadata is not None
    return answer.usage_metadata["input_tokens"] - answer.usage_metadata["input_token_details"]["cache_read"]  # pyright: ignore


def without_handles(messages: list[BaseMessage]) -> list[BaseMessage]:
    return [m.model_copy(update={"response_metadata": {}}) for m in messages]


def test_a_conversation_computes_what_is_new(model: AvpChatModel) -> None:
    messages: list[BaseMessage] = [SystemMessage("Answer in one word.")]
    for turn, question in enumerate(QUESTIONS):
        messages.append(HumanMessage(question))
        answer = model.invoke(messages)
        alone = model.invoke(without_handles(messages))
        assert answer.text == alone.text
        read = alone.usage_metadata["input_tokens"]  # pyright: ignore[reportOptionalSubscript]
        assert read == answer.usage_metadata["input_tokens"]  # pyright: ignore[reportOptionalSubscript]
        # without its context a prompt shares whole chunks with the one before it, and nothing else
        assert (read - prefilled(alone)) % INVARIANT_CHUNK == 0
        if turn:
            assert 0 < prefilled(answer) - model.get_num_tokens(question) <= BOUNDARY
        messages.append(answer)


def temperature(town: str) -> str:
    """The temperature in a town.

    Args:
        town: Its name.
    """
    return f"It is {len(town) + 11} degrees in {town}."


def read_by(answer: AIMessage, engine: LatentEngine) -> str:
    """Prompt and answer as text."""
    ids = engine.resolve(answer.response_metadata["avp_context"]).token_ids()
    return str(AutoTokenizer.from_pretrained(engine.model_path).decode(list(ids)))


def test_a_tool_loop_computes_what_is_new(engine: LatentEngine, model: AvpChatModel) -> None:
    agent = model.bind_tools([temperature], tool_choice="any").bind(max_tokens=32)
    messages: list[BaseMessage] = [HumanMessage("How warm is it in six towns?")]
    result = ""
    for step in range(6):
        answer = agent.invoke(messages)
        (call,) = answer.tool_calls
        assert answer.response_metadata["finish_reason"] == "tool_calls"
        if step:
            assert 0 < prefilled(answer) - model.get_num_tokens(result) <= BOUNDARY
        if step == 5:
            alone = agent.invoke(without_handles(messages))
            assert [call["args"] for call in alone.tool_calls] == [call["args"]]
            # the ids of a sampled call need not be those that its text encodes to
            assert read_by(alone, engine) == read_by(answer, engine)
        message = ToolMessage(temperature(**call["args"]), tool_call_id=call["id"], name="temperature")
        messages += [answer, message]
        # the default model's template knows no tools, so this is how it reads
        result = f"Result of temperature:\n{message.text}"


def test_reasoning_that_the_template_drops_is_not_kept_by_reuse(model: AvpChatModel) -> None:
    reasoner = model.bind(chat_template_kwargs={"reasons": True})
    messages: list[BaseMessage] = []
    for turn, question in enumerate(QUESTIONS[:3]):
        messages.append(HumanMessage(question))
        answer = reasoner.invoke(messages)
        alone = reasoner.invoke(without_handles(messages))
        reasoning: Any = answer.additional_kwargs["reasoning_content"]
        assert reasoning == alone.additional_kwargs["reasoning_content"] != ""
        assert answer.text == alone.text == ""
        assert answer.usage_metadata["input_tokens"] == alone.usage_metadata["input_tokens"]  # pyright: ignore
        assert answer.usage_metadata["output_token_details"] == {"reasoning": TOKENS}  # pyright: ignore
        if turn:
            assert 0 < prefilled(answer) - model.get_num_tokens(question) <= BOUNDARY + 4
            assert answer.response_metadata["avp"]["notes"] == [
                f"message {index} rendered again: the template treats earlier answers otherwise"
                for index in range(1, 2 * turn, 2)
            ]
        messages.append(answer)
