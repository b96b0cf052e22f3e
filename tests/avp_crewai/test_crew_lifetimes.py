"""Contexts end with their kickoff unless they are kept; nobody sees another crew's; nothing of them leaks."""

from __future__ import annotations

import gc
import json
import logging
import threading
import weakref
from typing import Any, cast

import pytest
from crewai import Crew
from crewai.crews.crew_output import CrewOutput
from crews import agent, crew, kickoff, task
from llm_events import Events
from scripted_crew_engine import ScriptedEngine

from avp_agents.errors import ContextLostError, InvalidHandleError
from avp_crewai import AvpLLM, handover
from avp_crewai.runs import _kickoffs


def two_tasks(engine: Any, about: str = "pens", **options: Any) -> Crew:
    researcher, solver = agent("Researcher", engine, llm={"mode": "latent"}), agent("Solver", engine)
    research = task(f"Think of {about}.", researcher, **options)
    return crew(research, task("Go on.", solver, context=[research]))


class TestKickoff:
    def test_its_contexts_are_there_while_it_runs_and_gone_afterwards(self, scripted: ScriptedEngine) -> None:
        stored: list[int] = []
        two_tasks(scripted, callback=lambda output: stored.append(len(scripted.store.list()))).kickoff()

        assert stored == [1]
        assert scripted.store.list() == []
        assert not _kickoffs

    def test_they_are_gone_when_it_fails(self, scripted: ScriptedEngine) -> None:
        def fail(output: Any) -> None:
            assert scripted.store.list()
            raise RuntimeError("the disk was full")

        with pytest.raises(RuntimeError, match="the disk was full"):
            two_tasks(scripted, callback=fail).kickoff()
        assert scripted.store.list() == []
        assert not _kickoffs

    def test_a_finished_crew_holds_no_context(self, scripted: ScriptedEngine) -> None:
        finished = two_tasks(scripted)
        finished.kickoff()
        handed = scripted.requests[-1].context
        assert handed is not None
        watched = weakref.ref(handed)
        del handed
        scripted.requests.clear()
        gc.collect()

        assert finished.tasks[0].output is not None
        assert watched() is None

    def test_superseded_contexts_go_at_once(self, scripted: ScriptedEngine) -> None:
        stored: list[int] = []
        verdicts: list[Any] = [(False, "Again."), (False, "Once more."), (True, "fine")]
        worker = agent("Worker", scripted)
        retried = task("Work.", worker, guardrail=lambda output: verdicts.pop(0))
        retried.callback = lambda output: stored.append(len(scripted.store.list()))
        kickoff(retried)

        assert stored == [1]


class TestHandover:
    def test_what_is_made_inside_is_kept(self, scripted: ScriptedEngine) -> None:
        with handover() as made:
            two_tasks(scripted).kickoff()

        assert made.handle is not None
        assert len(made.handles) == 2
        assert [call["mode"] for call in made.calls] == ["none", "kv"]
        assert len(scripted.engine.resolve(made.handle)) == made.handle.tokens
        made.release()
        assert scripted.store.list() == []

    def test_a_call_goes_on_from_what_it_is_given(self, scripted: ScriptedEngine) -> None:
        llm = AvpLLM(engine=cast("Any", scripted), max_tokens=3)
        with handover(scope="me") as made:
            llm.call("Remember the word tangerine.")
        assert made.handle is not None
        with handover(json.loads(json.dumps(made.handle.to_state())), scope="me") as after:
            llm.call("Which word?")

        assert scripted.requests[-1].context is not None
        assert after.calls[0]["mode"] == "kv"

    def test_agents_outside_of_crews_go_on_too(self, scripted: ScriptedEngine) -> None:
        worker = agent("Worker", scripted, llm={"mode": "latent"})
        with handover() as made:
            worker.kickoff("Think of a word.")
        with handover(made.handle) as after:
            agent("Solver", scripted).kickoff("Say it.")

        assert after.calls[0]["tokens_not_decoded"] == 3

    def test_a_handle_of_another_scope_is_not_honoured(self, scripted: ScriptedEngine) -> None:
        llm = AvpLLM(engine=cast("Any", scripted), max_tokens=3)
        with handover(scope="me") as made:
            llm.call("Remember the word tangerine.")
        with handover(made.handle, scope="you") as after:
            llm.call("Which word?")

        assert scripted.requests[-1].context is None
        assert after.calls[0]["mode"] == "lost"
        llm.on_missing = "error"
        with handover(made.handle, scope="you"), pytest.raises(ContextLostError):
            llm.call("Which word?")

    def test_what_is_no_handle_is_refused(self) -> None:
        with pytest.raises(InvalidHandleError), handover({"v": 1, "id": "../../etc/passwd"}):
            pass


def test_two_crews_at_once_do_not_see_each_others_contexts(scripted: ScriptedEngine) -> None:
    subjects = ("tangerines", "submarines")
    crews = [two_tasks(scripted, subject) for subject in subjects]
    threads = [threading.Thread(target=each.kickoff) for each in crews]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    handed = [request.context for request in scripted.requests if request.kind == "generate"]
    assert len(handed) == 2
    told = [scripted.engine._runtime.tokenizer.decode(list(context.token_ids())) for context in handed if context]
    assert sorted(sum(subject in text for subject in subjects) for text in told) == [1, 1]
    assert {subject for subject in subjects for text in told if subject in text} == set(subjects)


def test_output_and_logs_hold_no_context_and_no_key(
    scripted: ScriptedEngine, events: Events, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        output = two_tasks(scripted).kickoff()

    assert isinstance(output, CrewOutput)
    shown = [repr(output), output.model_dump_json(), caplog.text]
    shown += [event.model_dump_json(exclude={"callbacks"}) for event in events.completed]
    for text in shown:
        assert "tensor(" not in text
        assert "KvCache" not in text
        assert scripted.store.namespace.key.hex() not in text
        assert repr(scripted.store.namespace.key)[2:-1] not in text
