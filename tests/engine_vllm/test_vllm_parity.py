"""VllmEngine in this process and LatentEngine come to the same tokens, and go on with each other's contexts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: see docs/vllm.md")

from vllm_cases import STEPS, Reference, review, solve

from avp_agents import LatentEngine, LatentSegment, MemoryStore, Namespace
from avp_agents.answer.grammar import Grammar
from avp_agents.vllm import VllmEngine


@pytest.fixture(scope="module")
def engine(references: list[Reference], smollm2_path: Path) -> Iterator[VllmEngine]:
    """With the plugin for latent steps; after the references, so that the two do not compute at once."""
    store = MemoryStore(namespace=Namespace("vllm-tests", b"k" * 32))
    options = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 4, "num_gpu_blocks_override": 24}
    with VllmEngine.from_pretrained(
        str(smollm2_path), dtype="float32", latent_steps=True, store=store, **options
    ) as opened:
        yield opened


@pytest.fixture(params=[0, 1, 2], ids=["short", "long", "pier"])
def reference(references: list[Reference], request: pytest.FixtureRequest) -> Reference:
    return references[request.param]


def test_it_is_the_same_model(engine: VllmEngine, latent_engine: LatentEngine) -> None:
    assert (engine.fingerprint, engine.dtype) == (latent_engine.fingerprint, latent_engine.dtype)


def test_it_goes_on_with_contexts_of_the_latent_engine(engine: VllmEngine, reference: Reference) -> None:
    answer = solve(engine, reference.case, reference.thought)

    assert answer.token_ids == reference.answer.token_ids
    assert answer.context.recipe_id == reference.answer.context.recipe_id
    assert answer.handoff.mode == "replay"
    assert review(engine, reference.case, reference.answer.context).token_ids == reference.review.token_ids


def test_the_latent_engine_goes_on_with_its_contexts(
    engine: VllmEngine, latent_engine: LatentEngine, reference: Reference
) -> None:
    answered = solve(engine, reference.case, reference.thought).context
    handle = engine.store.put(answered)

    assert review(latent_engine, reference.case, engine.store.get(handle)).token_ids == reference.review.token_ids


def test_other_latents_give_another_answer(engine: VllmEngine, reference: Reference) -> None:
    answer = solve(engine, reference.case, reference.other)

    assert answer.token_ids == reference.control.token_ids
    assert answer.token_ids != reference.answer.token_ids


def test_it_thinks_as_the_latent_engine_does(
    engine: VllmEngine, latent_engine: LatentEngine, reference: Reference
) -> None:
    thought = engine.think(reference.case.research, steps=STEPS)

    assert thought.recipe_id == reference.thought.recipe_id
    own, theirs = thought.lineage[-1], reference.thought.lineage[-1]
    assert isinstance(own, LatentSegment)
    assert isinstance(theirs, LatentSegment)
    torch.testing.assert_close(own.embeddings, theirs.embeddings, atol=1e-3, rtol=1e-3)
    assert solve(latent_engine, reference.case, thought).token_ids == reference.answer.token_ids
    assert thought.usage is not None
    assert thought.usage.latent_steps == STEPS


def test_the_prefix_cache_is_reported(engine: VllmEngine, references: list[Reference]) -> None:
    long = references[1]
    solve(engine, long.case, long.thought)

    again = solve(engine, long.case, long.thought)

    assert again.usage.positions_reused >= 128
    assert again.handoff.positions_reused + again.handoff.positions_replayed == len(long.thought)


def test_answers_keep_to_a_grammar(engine: VllmEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }

    answer = engine.generate("Where is the Louvre?", grammar=Grammar.json_schema(schema), max_tokens=48)

    assert answer.text.startswith('{"city": "')
    assert answer.text.endswith("}")
    assert engine.generate("Yes or no?", grammar=Grammar.regex("yes|no"), max_tokens=4).text in ("yes", "no")
    assert engine.generate("Colour?", grammar=Grammar.lark('start: "red" | "blue"\n'), max_tokens=4).text in (
        "red",
        "blue",
    )


def test_logprobs_are_the_latent_engines(engine: VllmEngine, latent_engine: LatentEngine) -> None:
    ours, theirs = (each.generate("24 * 17?", max_tokens=3, logprobs=2).logprobs for each in (engine, latent_engine))

    assert ours is not None
    assert theirs is not None
    for own, other in zip(ours, theirs, strict=True):
        assert own.token_id == other.token_id
        assert own.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [id_ for id_, _ in own.top] == [id_ for id_, _ in other.top]


def test_a_stream_that_is_left_does_not_stay_in_vllm(engine: VllmEngine) -> None:
    for _ in range(6):  # more than vLLM runs at once
        stream = engine.stream("Count to a thousand.", max_tokens=400)
        next(stream)
        stream.close()

    assert len(engine.generate("Hello", max_tokens=2, timeout=60).token_ids) == 2


def test_a_graph_of_chat_models_runs_on_it(engine: VllmEngine, references: list[Reference]) -> None:
    pytest.importorskip("langgraph", reason="needs the extra `langgraph`")
    from langchain_core.messages import BaseMessage, HumanMessage
    from langgraph.graph import START, MessagesState, StateGraph

    from avp_langgraph import AvpChatModel

    researcher = AvpChatModel(engine=engine, mode="latent", latent_steps=STEPS)
    solver = AvpChatModel(engine=engine, max_tokens=8)

    def research(state: MessagesState) -> dict[str, list[BaseMessage]]:
        return {"messages": [researcher.invoke(state["messages"])]}

    def answer_it(state: MessagesState) -> dict[str, list[BaseMessage]]:
        return {"messages": [solver.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("research", research)
    graph.add_node("solve", answer_it)
    graph.add_edge(START, "research")
    graph.add_edge("research", "solve")
    question = MessagesState(messages=[HumanMessage(references[0].case.research)])
    _, thought, answer = graph.compile().invoke(question, {"configurable": {"thread_id": "1"}})["messages"]

    assert thought.response_metadata["avp"]["latent_steps"] == STEPS
    assert answer.response_metadata["avp"]["mode"] == "replay"
    assert answer.text
