"""A graph whose researcher and solver are different models: the thought crosses without anybody asking for it."""

from __future__ import annotations

from typing import Any

import pytest
from engines_of_two_models import Engines
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

from avp_agents import LatentEngine
from avp_langgraph import AvpChatModel

TEXT = "the lazy dog rests under the old tree"


def solve(engines: Engines, solver: LatentEngine, *more: Any) -> AIMessage:
    """The solver's answer to what the researcher thought about `TEXT`."""
    research = [SystemMessage("secret"), HumanMessage(TEXT)]
    thought = AvpChatModel(engine=engines.source, mode="latent", latent_steps=2).invoke(research)
    answer = AvpChatModel(engine=solver, max_tokens=4).invoke([thought, *more])
    assert isinstance(answer, AIMessage)
    return answer


def test_the_solver_reads_what_the_researcher_read(engines: Engines) -> None:
    """Nothing is lost: the metadata says how it crossed, and the answer's context holds the text."""
    answer = solve(engines, engines.target, HumanMessage("where is the dog?"))

    made = answer.response_metadata["avp"]
    assert made["mode"] == "reread"
    assert "smaller vocabulary is shared" in made["reason"]
    context = engines.target.resolve(answer.response_metadata["avp_context"])
    told = str(engines.target._runtime.tokenizer.decode(list(context.token_ids())))
    assert TEXT in told
    assert "secret" not in told
    assert "latent steps" not in told


def test_the_solver_takes_a_vector_where_its_engine_does(engines: Engines) -> None:
    """As above, with the thought itself."""
    answer = solve(engines, engines.projecting, HumanMessage("where is the dog?"))

    assert answer.response_metadata["avp"]["mode"] == "projection"
    context = engines.projecting.resolve(answer.response_metadata["avp_context"])
    assert context.latent_steps == 1


@pytest.mark.parametrize("name", ["target", "projecting"])
def test_the_conversation_goes_on(engines: Engines, name: str) -> None:
    """A second question reuses what the first one computed, the received context included."""
    solver: LatentEngine = getattr(engines, name)
    research = AvpChatModel(engine=engines.source, mode="latent", latent_steps=2)
    model = AvpChatModel(engine=solver, max_tokens=4)
    messages: list[Any] = [HumanMessage(TEXT)]
    messages.append(research.invoke(messages))
    messages.append(model.invoke(messages))
    messages.append(HumanMessage("and then?"))

    second = model.invoke(messages)

    first_length = messages[2].usage_metadata["total_tokens"]
    assert second.usage_metadata is not None
    assert second.usage_metadata["input_token_details"]["cache_read"] >= first_length - 1  # pyright: ignore
