"""The `contexts` channel: what its reducer promises to LangGraph, whatever the order of updates."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, MessagesState, StateGraph

from avp_agents.context import Context, TokenSegment
from avp_agents.errors import InvalidHandleError
from avp_agents.handle import ContextHandle
from avp_langgraph import ContextState, merge_contexts

IDS = st.integers(0, 3).map(lambda number: f"avp:1:{number:032x}")
HANDLES = st.builds(ContextHandle, id=IDS, agent=st.sampled_from(["a", "b"]), created=st.just("2026-01-01T00:00:00"))
UPDATES = st.none() | st.dictionaries(st.sampled_from("abc"), HANDLES | HANDLES.map(ContextHandle.to_state) | st.none())


@given(UPDATES, UPDATES, UPDATES)
def test_merging_is_associative(one: Any, two: Any, three: Any) -> None:
    assert merge_contexts(merge_contexts(one, two), three) == merge_contexts(one, merge_contexts(two, three))


@given(UPDATES, UPDATES)
def test_merging_the_same_update_again_changes_nothing(state: Any, update: Any) -> None:
    merged = merge_contexts(state, update)

    assert merge_contexts(merged, update) == merged
    assert merge_contexts(merged, merged) == merged


@given(UPDATES, UPDATES)
def test_updates_of_different_keys_commute(one: Any, two: Any) -> None:
    two = {key: value for key, value in (two or {}).items() if key not in (one or {})}

    assert merge_contexts(one, two) == merge_contexts(two, one)


@given(UPDATES, UPDATES)
def test_the_later_entry_wins_and_the_arguments_stay_as_they_were(state: Any, update: Any) -> None:
    before = (dict(state or {}), dict(update or {}))
    merged = merge_contexts(state, update)

    assert (dict(state or {}), dict(update or {})) == before
    for key, value in (update or {}).items():
        assert merged[key] == (value.to_state() if isinstance(value, ContextHandle) else value)


def test_none_takes_a_handle_back() -> None:
    handle = ContextHandle("avp:1:" + "0" * 32)

    assert merge_contexts({"a": handle, "b": handle}, {"a": None}) == {"a": None, "b": handle.to_state()}


def test_a_context_itself_is_refused() -> None:
    with pytest.raises(InvalidHandleError, match=r"contexts\['a'\] is a Context.*store.put"):
        merge_contexts({}, {"a": Context("f" * 64, "float32", (TokenSegment((1,)),))})


def test_parallel_branches_write_one_channel() -> None:
    class State(MessagesState, ContextState):
        question: str

    def branch(name: str) -> Any:
        return lambda state: {"contexts": {name: ContextHandle("avp:1:" + name * 32)}, "messages": [AIMessage(name)]}

    graph = StateGraph(State)
    for name in "abc":
        graph.add_node(name, branch(name))
        graph.add_edge(START, name)
        graph.add_edge(name, END)
    result = graph.compile().invoke({"question": "?", "messages": [], "contexts": {}})

    assert {key: handle["id"] for key, handle in result["contexts"].items()} == {
        name: "avp:1:" + name * 32 for name in "abc"
    }
