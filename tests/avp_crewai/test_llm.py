"""AvpLLM as CrewAI's interface to an LLM: calls, streaming, structured output, events, hooks, counts, copies."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any, cast

import pytest
from crewai import Agent, Crew
from crewai.events.types.llm_events import LLMCallFailedEvent, LLMCallStartedEvent, LLMStreamChunkEvent
from crewai.hooks import register_after_llm_call_hook, register_before_llm_call_hook
from crewai.hooks.llm_hooks import clear_all_llm_call_hooks
from crewai.llms.base_llm import call_stop_override
from crewai.utilities.agent_utils import is_context_length_exceeded
from crews import agent, crew, task
from llm_events import Events
from pydantic import BaseModel, Field, ValidationError, field_validator
from scripted_crew_engine import ScriptedEngine

from avp_agents import LatentEngine
from avp_agents.errors import ConfigurationError, PromptError
from avp_crewai import AvpContextOverflowError, AvpLLM, register_crewai_llm
from avp_crewai.reply import UnusableAnswerError

QUESTION: list[Any] = [
    {"role": "system", "content": "You count."},
    {"role": "user", "content": "Say a number.", "cache_breakpoint": True},
]


@pytest.fixture
def llm(scripted: ScriptedEngine) -> AvpLLM:
    return AvpLLM(engine=cast("Any", scripted), max_tokens=5)


class TestCall:
    def test_all_messages_are_read_with_their_roles(self, llm: AvpLLM, scripted: ScriptedEngine) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        conversation: list[Any] = [
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
            {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
        ]
        llm.call(conversation)

        sent = scripted.requests[0].prompt
        assert [message["role"] for message in sent] == ["system", "user", "assistant", "tool", "user"]
        assert sent[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
        assert sent[3] == {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"}
        assert "cache_breakpoint" not in sent[1]

    def test_acall_gives_the_same_answer(self, llm: AvpLLM) -> None:
        assert asyncio.run(llm.acall(QUESTION)) == llm.call(QUESTION)

    def test_cancelling_acall_ends_the_request(self, llm: AvpLLM, random_engine: LatentEngine) -> None:
        async def give_up() -> None:
            llm.max_tokens = 2000
            answering = asyncio.create_task(llm.acall("Tell a very long story."))
            await asyncio.sleep(0.5)
            answering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await answering
            for _ in range(100):
                if random_engine.stats().running == 0:
                    return
                await asyncio.sleep(0.05)
            pytest.fail("the request goes on")

        asyncio.run(give_up())

    def test_stops_are_enforced_those_of_one_call_too(self, llm: AvpLLM, scripted: ScriptedEngine) -> None:
        llm.stop = [" three"]
        llm.max_tokens = 20
        scripted.script = ["one two three four", "one two three four"]

        assert llm.call("Count.") == "one two"
        with call_stop_override(llm, [" two"]):
            assert llm.call("Count.") == "one"

    def test_an_answer_is_never_empty(self, engine: LatentEngine) -> None:
        assert AvpLLM(engine=engine, max_tokens=5, stop=["a", "e", "i", "o", "u", "H"]).call("Say hello.")

    def test_what_cannot_be_read_is_refused(self, llm: AvpLLM) -> None:
        image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}]
        with pytest.raises(PromptError, match="image_url"):
            llm.call(image)

    def test_nothing_is_stored_outside_of_crews(self, llm: AvpLLM, random_engine: LatentEngine) -> None:
        llm.call(QUESTION)

        assert random_engine.store.list() == []


class Verdict(BaseModel):
    number: int = Field(ge=0, le=9)
    word: str = Field(max_length=8)


class TestStructuredOutput:
    def test_the_answer_is_an_instance(self, llm: AvpLLM, events: Events) -> None:
        llm.max_tokens = 40
        verdict = llm.call("Which number?", response_model=Verdict)

        assert isinstance(verdict, Verdict)
        assert Verdict.model_validate(events.completed[0].response)

    def test_it_works_in_latent_mode_behind_the_thought(self, scripted: ScriptedEngine, events: Events) -> None:
        llm = AvpLLM(engine=cast("Any", scripted), mode="latent", latent_steps=2, max_tokens=40)

        assert isinstance(llm.call("Which number?", response_model=Verdict), Verdict)
        assert events.handoffs[0]["latent_steps"] == 2
        assert events.handoffs[0]["tokens_decoded"] > 0

    def test_what_only_a_validator_knows_is_an_error(self, llm: AvpLLM) -> None:
        class Strict(Verdict):
            @field_validator("word")
            @classmethod
            def refuse(cls, word: str) -> str:
                raise ValueError("never good enough")

        llm.max_tokens = 40
        with pytest.raises(UnusableAnswerError, match="never good enough"):
            llm.call("Which number?", response_model=Strict)


class TestEventsAndHooks:
    def test_a_call_is_reported(self, llm: AvpLLM, events: Events) -> None:
        text = llm.call(QUESTION)

        (started,) = events.of(LLMCallStartedEvent)
        (completed,) = events.completed
        assert started.call_id == completed.call_id
        assert (completed.response, completed.finish_reason) == (text, "length")
        assert completed.usage["completion_tokens"] == 5
        json.dumps(completed.usage)

    def test_a_failure_is_reported(self, llm: AvpLLM, events: Events) -> None:
        llm.temperature = -1
        with pytest.raises(ConfigurationError):
            llm.call("Hello.")

        (failed,) = events.of(LLMCallFailedEvent)
        assert failed.error.startswith("ConfigurationError: ")

    @pytest.mark.parametrize("how", ["stream", "stream_events"])
    def test_streaming(self, llm: AvpLLM, events: Events, how: str) -> None:
        if how == "stream":
            llm.stream = True
            text = llm.call(QUESTION)
        else:
            session = llm.stream_events(QUESTION)
            list(session)
            text = session.result

        chunks = events.of(LLMStreamChunkEvent)
        assert len(chunks) > 1
        assert "".join(chunk.chunk for chunk in chunks) == text

    def test_hooks_see_and_change_a_call(self, llm: AvpLLM, scripted: ScriptedEngine) -> None:
        register_before_llm_call_hook(lambda context: context.messages[-1].update(content="Say a colour."))
        register_after_llm_call_hook(lambda context: str(context.response).upper())
        try:
            answer = llm.call(QUESTION)
        finally:
            clear_all_llm_call_hooks()

        assert scripted.requests[0].prompt[-1]["content"] == "Say a colour."
        assert answer == answer.upper()


class TestCounts:
    def test_the_window_is_the_models_less_crewais_reserve(self, llm: AvpLLM, random_engine: LatentEngine) -> None:
        assert llm.get_context_window_size() == int(random_engine.context_window * 0.85)

    def test_tokens_are_the_models(self, llm: AvpLLM, random_engine: LatentEngine) -> None:
        counted = llm.get_input_tokens_count(QUESTION)

        assert counted == random_engine.count_tokens([{k: m[k] for k in ("role", "content")} for m in QUESTION])
        assert llm.get_input_tokens_count("") < llm.get_input_tokens_count("hello") < counted + 30

    def test_overflow_is_an_error_that_crewai_knows(self, llm: AvpLLM) -> None:
        with pytest.raises(AvpContextOverflowError) as caught:
            llm.call("word " * 10_000)

        assert is_context_length_exceeded(caught.value)
        assert caught.value.prompt > 10_000

    def test_crewai_summarises_what_does_not_fit(
        self, scripted: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker = agent("Worker", scripted, llm={"max_tokens": 20})
        monkeypatch.setattr(type(scripted.engine._runtime), "window", property(lambda runtime: 600))
        output = crew(task("Read this. " + "word " * 560, worker)).kickoff()

        assert str(output)
        assert len(scripted.requests) > 1

    def test_usage_is_counted_by_many_threads(self, llm: AvpLLM) -> None:
        async def many() -> None:
            await asyncio.gather(*(llm.acall(f"Say {i}.") for i in range(4)))

        asyncio.run(many())
        assert llm.get_token_usage_summary().successful_requests == 4
        assert llm.get_token_usage_summary().completion_tokens <= 20


class TestOptions:
    def test_a_misspelt_option_is_refused(self) -> None:
        with pytest.raises(ValidationError, match=r"no option 'temprature'\. Did you mean 'temperature'"):
            AvpLLM(**cast("Any", {"temprature": 0.5}))

    @pytest.mark.parametrize("option", [{"frequency_penalty": 0.5}, {"n": 2}, {"latent_steps": 0}, {"mode": "think"}])
    def test_what_it_cannot_do_is_refused(self, option: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match=next(iter(option))):
            AvpLLM(**option)

    def test_an_engine_has_a_model_and_a_namespace(self, random_engine: LatentEngine) -> None:
        assert AvpLLM(engine=random_engine).model == random_engine.model_path
        options: list[Any] = [{"model": "other"}, {"namespace": "other"}, {"engine_options": {"dtype": "float32"}}]
        for option in options:
            with pytest.raises(ValidationError, match="engine"):
                AvpLLM(engine=random_engine, **option)

    def test_a_line_that_cannot_be_filled_in_is_refused(self, random_engine: LatentEngine) -> None:
        for line, complaint in (("{role} thought.", "knows {agent}"), (" ", "refuses an empty answer")):
            llm = AvpLLM(engine=random_engine, mode="latent", latent_steps=1, latent_line=line)
            with pytest.raises(ConfigurationError, match=complaint):
                llm.call("Hello.")

    def test_llms_of_one_model_share_an_engine(
        self, monkeypatch: pytest.MonkeyPatch, random_engine: LatentEngine
    ) -> None:
        asked: list[Any] = []
        monkeypatch.setattr(
            "avp_crewai.llm.shared_engine", lambda *args, **options: asked.append(args) or random_engine
        )
        AvpLLM(max_tokens=1).call("Hello.")
        AvpLLM(model="some/model", max_tokens=1, engine_options={"dtype": "float32"}).call("Hello.")

        assert asked == [(None, {}), ("some/model", {"dtype": "float32"})]


class TestCopies:
    def test_copies_share_the_engine_and_count_alone(self, llm: AvpLLM, scripted: ScriptedEngine) -> None:
        llm.call("Hello.")
        for copied in (copy.copy(llm), copy.deepcopy(llm), llm.model_copy()):
            assert copied.engine is scripted
            assert copied.get_token_usage_summary().total_tokens == 0
        assert llm.get_token_usage_summary().total_tokens > 0

    def test_serialised_it_is_options_without_engine(self, llm: AvpLLM) -> None:
        assert "engine" not in llm.model_dump()
        assert "engine" not in json.loads(llm.model_dump_json())
        assert AvpLLM(**AvpLLM(mode="latent", stop=["x"]).to_config_dict()).mode == "latent"

    def test_a_checkpoint_brings_it_back(self, random_engine: LatentEngine) -> None:
        worker = agent("Worker", random_engine, llm={"mode": "latent", "latent_steps": 7})
        saved = json.loads(Crew(agents=[worker], tasks=[task("Work.", worker)]).model_dump_json())
        assert str(random_engine.model_path) in json.dumps(saved)

        register_crewai_llm()
        restored = Agent.model_validate(saved["agents"][0], context={"from_checkpoint": True})
        assert isinstance(restored.llm, AvpLLM)
        assert (restored.llm.mode, restored.llm.latent_steps) == ("latent", 7)
        assert restored.llm.engine is None


def test_a_namespace_key_is_never_shown(random_engine: LatentEngine, events: Events) -> None:
    llm = AvpLLM(engine=random_engine, max_tokens=2)
    llm.call("Hello.")
    shown = "".join([repr(llm), llm.model_dump_json(), *(event.model_dump_json() for event in events.completed)])

    for form in (repr(random_engine.store.namespace.key)[2:-1], random_engine.store.namespace.key.hex()):
        assert form not in shown
