"""AvpChatModel as LangChain sees it: messages in, messages with handles, usage and metadata out."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fake_engine import FakeEngine
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError
from langchain_core.globals import set_llm_cache
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages
from pydantic import ValidationError

from avp_agents.context import LatentSegment
from avp_agents.errors import ConfigurationError, ContextWindowError, PromptError
from avp_langgraph import AvpChatModel

QUESTION = HumanMessage("What is 24 * 17 + 3?")


@pytest.fixture
def solver(engine: FakeEngine) -> AvpChatModel:
    return AvpChatModel(engine=engine)


@pytest.fixture
def researcher(engine: FakeEngine) -> AvpChatModel:
    return AvpChatModel(engine=engine, mode="latent", latent_steps=7)


def made(message: BaseMessage) -> dict[str, Any]:
    return message.response_metadata["avp"]


def handle_of(message: BaseMessage) -> dict[str, Any]:
    return message.response_metadata["avp_context"]


class TestThinking:
    def test_decodes_nothing_and_answers_with_a_line_for_people(self, researcher: AvpChatModel) -> None:
        thought = researcher.invoke([QUESTION])
        context = researcher._engine_for(researcher.model_name).resolve(handle_of(thought))

        assert thought.content == f"The model thought for 7 latent steps ({len(context)} positions)"
        assert made(thought)["tokens_decoded"] == 0
        assert isinstance(context.lineage[-1], LatentSegment)
        assert len(context.lineage[-1]) == 7

    def test_counts_latent_steps_as_reasoning(self, researcher: AvpChatModel) -> None:
        usage = researcher.invoke([QUESTION]).usage_metadata

        assert usage is not None
        assert usage.get("output_token_details") == {"reasoning": 7}
        assert usage["output_tokens"] == 7
        assert usage["total_tokens"] == usage["input_tokens"] + 7

    def test_says_how_so_that_it_can_be_done_again(self, engine: FakeEngine) -> None:
        model = AvpChatModel(engine=engine, mode="latent", latent_steps=3, latent_method="ridge", latent_k=16)

        assert made(model.invoke([QUESTION]))["think"] == {
            "method": "ridge", "k": 16, "temperature": 1.0, "renormalise": False, "steps": 3,
            "stop_cosine": None, "stop_entropy": None,
        }  # fmt: skip


class TestHandingOver:
    def test_the_solver_answers_on_the_thought_and_never_reads_its_line(
        self, engine: FakeEngine, researcher: AvpChatModel, solver: AvpChatModel
    ) -> None:
        thought = researcher.invoke([QUESTION])
        answer = solver.invoke([QUESTION, thought])
        request = engine.requests[-1]

        assert request.base is engine.resolve(handle_of(thought))
        assert "thought for" not in request.text
        assert made(answer)["mode"] == "kv"
        assert made(answer)["tokens_not_decoded"] == 7
        assert answer.usage_metadata is not None
        assert answer.usage_metadata.get("input_token_details") == {"cache_read": handle_of(thought)["tokens"]}

    def test_another_thought_makes_another_answer(self, researcher: AvpChatModel, solver: AvpChatModel) -> None:
        thoughts = [researcher.invoke([HumanMessage(text)]) for text in ("What is 1 + 1?", "What is 2 + 2?")]

        assert solver.invoke([QUESTION, thoughts[0]]).text != solver.invoke([QUESTION, thoughts[1]]).text

    def test_a_thought_from_other_instructions_is_handed_over(
        self, engine: FakeEngine, researcher: AvpChatModel, solver: AvpChatModel
    ) -> None:
        thought = researcher.invoke([SystemMessage("Analyse."), QUESTION])
        answer = solver.invoke([QUESTION, thought, HumanMessage("Solve it.")])

        assert engine.requests[-1].base is engine.resolve(handle_of(thought))
        assert "Solve it." in engine.requests[-1].text
        assert made(answer)["reason"].startswith("handoff")

    def test_a_conversation_computes_only_what_is_new(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        messages: list[BaseMessage] = [QUESTION]
        for turn in range(3):
            answer = solver.invoke(messages)
            assert answer.usage_metadata is not None
            fresh = answer.usage_metadata["input_tokens"] - len(engine.requests[-1].text)
            assert made(answer)["positions_reused"] == fresh
            messages += [answer, HumanMessage(f"And plus {turn}?")]

        assert engine.requests[-1].text == "|And plus 1?||"

    def test_a_handle_given_to_the_call_wins(
        self, engine: FakeEngine, researcher: AvpChatModel, solver: AvpChatModel
    ) -> None:
        ours, given = researcher.invoke([QUESTION]), researcher.invoke([HumanMessage("Another question")])
        solver.invoke([QUESTION, ours, HumanMessage("Solve it.")], avp_context=handle_of(given))

        assert engine.requests[-1].base is engine.resolve(handle_of(given))

    def test_a_bound_handle_is_used(self, engine: FakeEngine, researcher: AvpChatModel, solver: AvpChatModel) -> None:
        thought = researcher.invoke([QUESTION])
        solver.bind(avp_context=handle_of(thought)).invoke("Solve it.")

        assert engine.requests[-1].base is engine.resolve(handle_of(thought))


class TestStreaming:
    def test_pieces_make_the_answer_and_the_last_has_the_rest(self, solver: AvpChatModel) -> None:
        pieces = list(solver.stream([QUESTION]))

        assert "".join(piece.text for piece in pieces) == solver.invoke([QUESTION]).text
        assert len(pieces) > 3
        assert [piece.chunk_position for piece in pieces] == [None] * (len(pieces) - 1) + ["last"]
        assert [bool(piece.usage_metadata) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert all("avp_context" not in piece.response_metadata for piece in pieces[:-1])

    async def test_all_four_ways_give_the_same(self, solver: AvpChatModel) -> None:
        expected = solver.invoke([QUESTION])
        streamed = [piece async for piece in solver.astream([QUESTION])]

        assert (await solver.ainvoke([QUESTION])).text == expected.text
        assert "".join(piece.text for piece in streamed) == expected.text
        assert streamed[-1].response_metadata["avp_context"]["id"] == handle_of(expected)["id"]

    async def test_thinking_is_one_piece(self, researcher: AvpChatModel) -> None:
        expected = researcher.invoke([QUESTION])

        assert [piece.text for piece in researcher.stream([QUESTION])] == [expected.text]
        assert [piece.text async for piece in researcher.astream([QUESTION])] == [expected.text]
        assert (await researcher.ainvoke([QUESTION])).text == expected.text

    def test_callbacks_hear_every_token_of_an_invoke(self, solver: AvpChatModel) -> None:
        class Listener(BaseCallbackHandler):
            heard: str = ""

            def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
                self.heard += token

        listener = Listener()
        answer = solver.invoke([QUESTION], config={"callbacks": [listener]})

        assert listener.heard == answer.text

    def test_leaving_a_stream_ends_the_request(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        stream = solver.stream([QUESTION])
        next(stream)
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]

        assert engine.cancelled == 1

    async def test_leaving_an_async_stream_ends_the_request(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        stream = solver.astream([QUESTION])
        await anext(stream)
        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]

        assert engine.cancelled == 1

    async def test_cancelling_a_task_ends_the_request(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        engine.delay = 0.05
        task = asyncio.create_task(solver.ainvoke([QUESTION]))
        await asyncio.sleep(0.12)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert engine.cancelled == 1


class TestOptions:
    def test_fields_reach_the_engine(self, engine: FakeEngine) -> None:
        options = {
            "temperature": 0.7, "max_tokens": 5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1,
            "seed": 3, "logprobs": 2, "stop": ["\n"], "timeout": 9.0,
        }  # fmt: skip
        AvpChatModel(engine=engine, **options).invoke([QUESTION])  # pyright: ignore[reportArgumentType]

        assert engine.requests[-1].options == {**options, "source": ""}

    def test_fields_that_are_not_set_leave_the_engines_defaults(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        solver.invoke([QUESTION])

        assert engine.requests[-1].options == {"source": ""}

    def test_a_call_overrides_fields(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        assert made(solver.invoke([QUESTION], mode="latent", latent_steps=2))["latent_steps"] == 2
        assert solver.invoke([QUESTION], max_tokens=2).response_metadata["finish_reason"] == "length"
        assert solver.bind(temperature=0.5).invoke([QUESTION])
        assert engine.requests[-1].options["temperature"] == 0.5

    @pytest.mark.parametrize("by_field", [True, False])
    def test_stop_strings_end_the_answer(self, engine: FakeEngine, solver: AvpChatModel, by_field: bool) -> None:
        first, second, *_ = solver.invoke([QUESTION]).text.split(" ")
        if by_field:
            cut = AvpChatModel(engine=engine, stop=[second]).invoke([QUESTION])
        else:
            cut = solver.invoke([QUESTION], stop=[second])

        assert cut.text.strip() == first
        assert cut.response_metadata["finish_reason"] == "stop"

    def test_log_probabilities_are_in_the_metadata(self, solver: AvpChatModel) -> None:
        logprobs = solver.invoke([QUESTION], logprobs=1).response_metadata["logprobs"]["content"]

        assert logprobs[0]["logprob"] == -0.5
        assert logprobs[0]["top_logprobs"] == [{"token_id": 7, "logprob": -0.5}]

    def test_misspelt_options_are_refused(self, solver: AvpChatModel) -> None:
        with pytest.raises(ValidationError, match=r"no option 'temprature'\. Did you mean 'temperature'"):
            AvpChatModel(temprature=1)  # pyright: ignore[reportCallIssue]
        with pytest.raises(ConfigurationError, match="Unknown option 'temprature'; a call knows avp_context"):
            solver.invoke([QUESTION], temprature=1)

    @pytest.mark.parametrize("option", [{"mode": "telepathy"}, {"on_missing": "guess"}, {"latent_steps": 0}])
    def test_values_out_of_range_are_refused(self, solver: AvpChatModel, option: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(option))):
            solver.invoke([QUESTION], **option)

    def test_what_only_hosted_models_need_is_ignored(self, engine: FakeEngine) -> None:
        assert AvpChatModel(engine=engine, api_key="secret", max_retries=3).invoke([QUESTION]).text  # pyright: ignore

    def test_an_engine_has_its_own_model_and_namespace(self, engine: FakeEngine) -> None:
        model = AvpChatModel(engine=engine)

        assert (model.model_name, model.namespace) == ("fake/model", "tests")
        for contradiction in ({"model": "other"}, {"namespace": "other"}, {"engine_options": {"dtype": "float32"}}):
            with pytest.raises(ValidationError, match="engine"):
                AvpChatModel(engine=engine, **contradiction)  # pyright: ignore[reportArgumentType]


class TestMessages:
    def test_text_blocks_are_joined_and_tools_are_told(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        call = {"name": "add", "args": {"a": 1}, "id": "1"}
        history = [
            SystemMessage("Be brief."),
            HumanMessage([{"type": "text", "text": "one "}, "two"]),
            AIMessage("calling", tool_calls=[call]),
            ToolMessage("three", tool_call_id="1", name="add"),
        ]
        solver.invoke(history)

        assert engine.requests[-1].text == "|Be brief.||one two||calling||three||"

    @pytest.mark.parametrize("kind", ["image", "image_url", "audio", "file"])
    def test_media_is_refused(self, solver: AvpChatModel, kind: str) -> None:
        with pytest.raises(PromptError, match=f"'{kind}' cannot be given to this model: it reads text only"):
            solver.invoke([HumanMessage([{"type": kind, "base64": "AAAA", "mime_type": "a/b"}])])

    def test_a_prompt_that_is_too_long_is_known_to_both_sides(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        engine.context_window = 20
        for error in (ContextOverflowError, ContextWindowError):
            with pytest.raises(error, match="the model's window is 20"):
                solver.invoke([QUESTION])

    def test_tokens_are_counted_by_the_model(
        self, engine: FakeEngine, researcher: AvpChatModel, solver: AvpChatModel
    ) -> None:
        thought = researcher.invoke([QUESTION])
        alone = engine.count_tokens([{"role": "user", "content": QUESTION.text}])

        assert solver.get_num_tokens("four") == 4
        assert solver.get_num_tokens_from_messages([QUESTION]) == alone
        assert solver.get_num_tokens_from_messages([QUESTION, thought]) == alone + 7
        assert trim_messages([QUESTION, HumanMessage("last")], max_tokens=10, token_counter=solver) == [
            HumanMessage("last")
        ]

    def test_token_ids_are_the_models_unless_others_are_wanted(self, engine: FakeEngine, solver: AvpChatModel) -> None:
        assert solver.get_token_ids("four") == engine.encode("four")
        assert AvpChatModel(engine=engine, custom_get_token_ids=lambda text: [4, 2]).get_num_tokens("four") == 2


class TestStateAndTraces:
    def test_a_message_is_json_and_its_handle_small(self, researcher: AvpChatModel, solver: AvpChatModel) -> None:
        thought = researcher.invoke([QUESTION])
        for message in (thought, solver.invoke([QUESTION, thought])):
            assert json.loads(json.dumps(message.response_metadata)) == message.response_metadata
            assert len(json.dumps(handle_of(message))) < 300

    def test_no_folder_is_named(self) -> None:
        model = AvpChatModel(engine=FakeEngine(model_path="/home/someone/models/tiny"))
        answer = model.invoke([QUESTION])

        assert answer.response_metadata["model_name"] == "tiny"
        assert "/home" not in json.dumps(answer.response_metadata)
        assert model._get_ls_params()["ls_model_name"] == "tiny"  # pyright: ignore[reportTypedDictNotRequiredAccess]

    @pytest.mark.filterwarnings("ignore:The function `load` is in beta")
    def test_the_configuration_is_serialised_without_the_engine(self, engine: FakeEngine) -> None:
        model = AvpChatModel(engine=engine, mode="latent", temperature=0.0, namespace="tests")
        data = dumpd(model)
        again = load(data, valid_namespaces=["avp_langgraph"], allowed_objects=[AvpChatModel])

        assert "engine" not in data["kwargs"]
        assert again.engine is None
        assert again.asdict() == model.asdict()

    def test_the_cache_tells_contexts_apart(self, engine: FakeEngine, researcher: AvpChatModel) -> None:
        cached = AvpChatModel(engine=engine, cache=InMemoryCache())
        thoughts = [researcher.invoke([HumanMessage(text)]) for text in ("What is 1 + 1?", "What is 2 + 2?")]
        calls = len(engine.requests)
        answers = [cached.invoke("Solve it.", avp_context=handle_of(thought)).text for thought in thoughts * 2]

        assert answers[0] != answers[1]
        assert answers[:2] == answers[2:]
        assert len(engine.requests) == calls + 2

    def test_thoughts_are_not_cached(self, engine: FakeEngine, researcher: AvpChatModel) -> None:
        set_llm_cache(InMemoryCache())
        try:
            researcher.invoke([QUESTION])
            researcher.invoke([QUESTION])
        finally:
            set_llm_cache(None)

        assert [request.kind for request in engine.requests] == ["think", "think"]
