"""What LangChain offers around any chat model: fallbacks, retries, fields set at run time, trimming, summaries."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fake_engine import FakeEngine
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.exceptions import (
    ContextOverflowError,
    ModelInvalidRequestError,
    ModelNotFoundError,
    ModelRateLimitError,
    ModelTimeoutError,
)
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, trim_messages
from langchain_core.runnables import ConfigurableField

from avp_agents import LatentEngine, errors
from avp_langgraph import AvpChatModel, close_engines

QUESTION = HumanMessage("What is 24 * 17 + 3?")


@pytest.fixture
def model(engine: FakeEngine) -> AvpChatModel:
    return AvpChatModel(engine=engine)


def made(message: BaseMessage) -> dict[str, Any]:
    return message.response_metadata["avp"]


class Flaky(FakeEngine):
    """Raises the errors it was given, one per call, and then answers."""

    def __init__(self, *raised: Exception) -> None:
        super().__init__()
        self.raised = list(raised)

    def stream(self, *args: Any, **options: Any) -> Any:
        if self.raised:
            raise self.raised.pop(0)
        return super().stream(*args, **options)


class TestErrors:
    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (errors.PromptError("no"), ModelInvalidRequestError),
            (errors.RequestTimeoutError("slow"), ModelTimeoutError),
            (errors.EngineBusyError("full"), ModelRateLimitError),
            (errors.ModelNotFoundError("gone"), ModelNotFoundError),
            (errors.ContextWindowError(window=1, context=2, prompt=3, requested=4), ContextOverflowError),
        ],
    )
    def test_each_is_known_to_both_sides(self, ours: Exception, theirs: type[Exception]) -> None:
        for kind in (type(ours), theirs):
            with pytest.raises(kind, match=re.escape(str(ours))) as raised:
                AvpChatModel(engine=Flaky(ours)).invoke([QUESTION])
            assert isinstance(raised.value, errors.AvpError)

    def test_a_model_that_is_nowhere(self) -> None:
        with pytest.raises(ModelNotFoundError, match="There is no folder /nowhere"):
            AvpChatModel(model="/nowhere").invoke([QUESTION])
        close_engines()


class TestRetriesAndFallbacks:
    def test_a_busy_engine_is_asked_again(self) -> None:
        engine = Flaky(errors.EngineBusyError("full"), errors.EngineBusyError("full"))
        model = AvpChatModel(engine=engine).with_retry(
            retry_if_exception_type=(errors.EngineBusyError,), wait_exponential_jitter=False, stop_after_attempt=3
        )

        assert model.invoke([QUESTION]).text
        assert engine.raised == []

    def test_another_model_steps_in(self, model: AvpChatModel) -> None:
        broken = AvpChatModel(engine=Flaky(errors.EngineClosedError("closed")))

        assert broken.with_fallbacks([model]).invoke([QUESTION]).text == model.invoke([QUESTION]).text

    def test_a_thought_of_the_first_model_is_thought_again_by_the_other(self, engine: FakeEngine) -> None:
        thought = AvpChatModel(engine=engine, mode="latent").invoke([QUESTION])
        other = AvpChatModel(engine=FakeEngine("other/model", store=engine.store))
        broken = AvpChatModel(engine=Flaky(errors.EngineClosedError("closed")))

        assert made(broken.with_fallbacks([other]).invoke([QUESTION, thought]))["mode"] == "rethink"


class TestFieldsSetAtRunTime:
    def test_configurable_fields(self, engine: FakeEngine, model: AvpChatModel) -> None:
        configurable = model.configurable_fields(max_tokens=ConfigurableField("most"), mode=ConfigurableField("mode"))

        assert (
            configurable.invoke([QUESTION], {"configurable": {"most": 2}}).response_metadata["finish_reason"]
            == "length"
        )
        assert made(configurable.invoke([QUESTION], {"configurable": {"mode": "latent"}}))["latent_steps"] == 20
        assert engine.requests[-1].kind == "think"

    def test_configurable_alternatives(self, engine: FakeEngine, model: AvpChatModel) -> None:
        thinking = AvpChatModel(engine=engine, mode="latent", latent_steps=3)
        either = model.configurable_alternatives(ConfigurableField("agent"), default_key="writes", thinks=thinking)

        assert made(either.invoke([QUESTION]))["latent_steps"] == 0
        assert made(either.invoke([QUESTION], {"configurable": {"agent": "thinks"}}))["latent_steps"] == 3


class TestShorterHistories:
    def conversation(self, model: AvpChatModel, turns: int) -> list[BaseMessage]:
        messages: list[BaseMessage] = []
        for turn in range(turns):
            messages.append(HumanMessage(f"Question {turn}?"))
            messages.append(model.invoke(messages))
        return messages

    def test_a_trimmed_conversation_is_read_as_it_is(self, engine: FakeEngine, model: AvpChatModel) -> None:
        """The contexts of what is left were made from more; they are not what the trimmed messages say."""
        messages = self.conversation(model, 4)
        limit = model.get_num_tokens_from_messages(messages[-2:]) + 20
        kept = trim_messages([*messages, QUESTION], max_tokens=limit, token_counter=model, start_on="human")
        answer = model.invoke(kept)

        assert kept[-3:] == [*messages[-2:], QUESTION] or kept[-1:] == [QUESTION]
        assert made(answer)["mode"] == "none"
        assert "Question 0?" not in engine.requests[-1].text
        assert answer.text == model.invoke([m.model_copy(update={"response_metadata": {}}) for m in kept]).text

    @pytest.mark.parametrize("trigger", [("messages", 5), ("fraction", 0.01)])
    async def test_summaries_replace_what_the_contexts_held(
        self, engine: FakeEngine, model: AvpChatModel, trigger: Any
    ) -> None:
        summarizer = SummarizationMiddleware(model=model, trigger=trigger, keep=("messages", 2))
        agent: Any = create_agent(model, middleware=[summarizer])
        messages = self.conversation(model, 3)
        result = await agent.ainvoke({"messages": [*messages, QUESTION]})
        summary, *kept, answer = result["messages"]

        assert "summary" in summary.text.lower()
        assert [message.text for message in kept] == [messages[-1].text, QUESTION.text]
        assert made(answer)["mode"] == "none"
        assert "Question 0?" not in engine.requests[-1].text
        assert (
            any("rendered as text" in note for note in made(answer)["notes"]) or made(answer)["positions_reused"] == 0
        )

    def test_a_thought_whose_message_was_summarised_is_reached_by_its_handle(
        self, engine: FakeEngine, model: AvpChatModel
    ) -> None:
        """As nodes do that keep handles in the state's `contexts`."""
        thought = AvpChatModel(engine=engine, mode="latent").invoke([QUESTION])
        summary = HumanMessage("Summary: a sum was asked for.")
        answer = model.invoke([summary, HumanMessage("And?")], avp_context=thought.response_metadata["avp_context"])

        assert made(answer)["mode"] == "kv"
        assert engine.requests[-1].base is engine.resolve(thought.response_metadata["avp_context"])


class TestMessages:
    def test_what_tools_were_called_with_counts_as_content(self, engine: FakeEngine, model: AvpChatModel) -> None:
        """A person who corrects a call before it is run wants the corrected one to be read."""
        answer = model.invoke([QUESTION])
        call = {"name": "add", "args": {"a": 1}, "id": "1"}
        edited = AIMessage(answer.text, tool_calls=[call], response_metadata=answer.response_metadata)
        reply = model.invoke([QUESTION, edited, HumanMessage("Well?")])

        assert made(reply)["mode"] == "text"
        assert "edited" in made(reply)["reason"]

    def test_content_that_repeats_tool_calls_is_left_out(self, engine: FakeEngine, model: AvpChatModel) -> None:
        blocks: list[Any] = [
            {"type": "text", "text": "calling"},
            {"type": "tool_use", "id": "1", "name": "add", "input": {}},
        ]
        call = {"name": "add", "args": {}, "id": "1"}
        model.invoke([QUESTION, AIMessage(blocks, tool_calls=[call]), HumanMessage("Well?")])

        assert engine.requests[-1].text == f"|{QUESTION.text}||calling||Well?||"

    def test_roles_of_other_names(self, engine: FakeEngine, model: AvpChatModel) -> None:
        model.invoke([("developer", "Be brief."), ("human", "Hi"), ("ai", "Hello"), ("user", "Bye")])

        assert engine.requests[-1].text == "|Be brief.||Hi||Hello||Bye||"
        assert model.invoke(
            [SystemMessage("Be brief."), HumanMessage("Hi"), AIMessage("Hello"), HumanMessage("Bye")]
        ).text


class TestProfile:
    def test_of_an_engine(self, model: AvpChatModel) -> None:
        assert model.profile is not None
        assert model.profile["max_input_tokens"] == 10_000  # pyright: ignore[reportTypedDictNotRequiredAccess]
        assert model.profile["image_inputs"] is False  # pyright: ignore[reportTypedDictNotRequiredAccess]

    def test_of_the_default_model(self, real_engine: LatentEngine) -> None:
        for model in (AvpChatModel(), AvpChatModel(model=real_engine.model_path), AvpChatModel(engine=real_engine)):
            assert model.profile is not None
            assert model.profile["max_input_tokens"] == real_engine.context_window  # pyright: ignore[reportTypedDictNotRequiredAccess]

    @pytest.mark.parametrize("name", ["nobody/has-this-model", "/nowhere", "not a model's name"])
    def test_of_a_model_that_is_not_here_yet(self, name: str) -> None:
        profile = AvpChatModel(model=name).profile
        assert profile is not None
        assert "max_input_tokens" not in profile

    def test_that_the_user_gives(self) -> None:
        assert AvpChatModel(model="nobody/has-this-model", profile={"max_input_tokens": 7}).profile == {
            "max_input_tokens": 7
        }
