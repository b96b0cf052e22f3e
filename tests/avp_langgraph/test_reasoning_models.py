"""Models that reason in text before they answer: where it goes, and what becomes of it in later turns."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage

from avp_langgraph import AvpChatModel

QUESTION = HumanMessage("What is 24 * 17 + 3?")
WHY = HumanMessage("Why?")
REASONING = "24 * 17 = 408. "


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(reasoning=REASONING)


@pytest.fixture
def model(engine: FakeEngine) -> AvpChatModel:
    return AvpChatModel(engine=engine)


def test_reasoning_stands_beside_the_text(model: AvpChatModel) -> None:
    answer = model.invoke([QUESTION])

    assert answer.additional_kwargs["reasoning_content"] == REASONING
    assert REASONING not in answer.text
    assert answer.content_blocks == [
        {"type": "reasoning", "reasoning": REASONING}, {"type": "text", "text": answer.text},
    ]  # fmt: skip


def test_reasoning_is_streamed_before_the_text(model: AvpChatModel) -> None:
    pieces = list(model.stream([QUESTION]))
    first_text = next(i for i, piece in enumerate(pieces) if piece.text)
    whole = sum(pieces[1:], pieces[0])

    assert "".join(piece.additional_kwargs.get("reasoning_content", "") for piece in pieces[:first_text]) == REASONING
    assert isinstance(whole, AIMessageChunk)
    assert whole.additional_kwargs["reasoning_content"] == REASONING
    assert whole.text == model.invoke([QUESTION]).text


async def test_event_loops_get_the_same(model: AvpChatModel) -> None:
    assert (await model.ainvoke([QUESTION])).additional_kwargs["reasoning_content"] == REASONING


def test_reasoning_counts_as_such_within_the_output(model: AvpChatModel) -> None:
    usage = model.invoke([QUESTION]).usage_metadata

    assert usage is not None
    assert usage["output_token_details"] == {"reasoning": len(REASONING.split())}  # pyright: ignore[reportTypedDictNotRequiredAccess]
    assert usage["output_tokens"] == 6 + len(REASONING.split())


def test_later_turns_do_not_read_it(engine: FakeEngine, model: AvpChatModel) -> None:
    answer = model.invoke([QUESTION])
    reply = model.invoke([QUESTION, answer, WHY])

    assert REASONING not in engine.requests[-1].text
    assert engine.requests[-1].text == f"|{QUESTION.text}||{answer.text}||Why?||"
    assert reply.text == model.invoke([QUESTION, AIMessage(answer.text), WHY]).text


def test_an_answer_with_v1_content_still_stands_for_its_context(engine: FakeEngine) -> None:
    """LangChain can put reasoning and text into blocks of the content."""
    answer = AvpChatModel(engine=engine, output_version="v1").invoke([QUESTION])
    assert isinstance(answer.content, list)
    AvpChatModel(engine=engine).invoke([QUESTION, answer, WHY])

    assert engine.requests[-1].text == f"|{QUESTION.text}||{answer.text}||Why?||"


@pytest.mark.parametrize(
    "blocks",
    [
        [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "411"}],
        [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "411"}],
        [{"type": "redacted_thinking", "data": "x"}, "411"],
    ],
)
def test_what_other_models_reasoned_is_not_text(engine: FakeEngine, model: AvpChatModel, blocks: list[Any]) -> None:
    model.invoke([QUESTION, AIMessage(blocks), WHY])

    assert engine.requests[-1].text == f"|{QUESTION.text}||411||Why?||"


def test_template_options_reach_the_engine(engine: FakeEngine, model: AvpChatModel) -> None:
    quick = AvpChatModel(engine=engine, chat_template_kwargs={"enable_thinking": False})
    for call in (quick, model.bind(chat_template_kwargs={"enable_thinking": False}), quick.bind(mode="latent")):
        call.invoke([QUESTION])
        assert engine.requests[-1].options["chat_template_kwargs"] == {"enable_thinking": False}
    model.invoke([QUESTION])

    assert "chat_template_kwargs" not in engine.requests[-1].options
    assert quick.asdict() != model.asdict()
