"""A context on a server becomes one of an engine here, by whichever mode fits the two models."""

from __future__ import annotations

import pytest

from avp_agents import LatentEngine, LatentSegment
from avp_agents.errors import FrameError, HandshakeError
from avp_agents.protocol.handshake import CrossingMode
from avp_agents.transport import RemoteEngine
from avp_agents.transport.client import hand_over
from avp_agents.transport.client.remote_context import RemoteContext

FACT = "the lazy dog rests under the old tree"


@pytest.fixture
def thought(remote: RemoteEngine) -> RemoteContext:
    """What the server's engine thinks."""
    messages = [{"role": "system", "content": "secret"}, {"role": "user", "content": FACT}]
    return remote.think(messages, steps=3)


@pytest.mark.parametrize("mode", ["kv", "replay"])
def test_the_same_model_goes_on_exactly(
    remote: RemoteEngine, same: LatentEngine, thought: RemoteContext, mode: CrossingMode
) -> None:
    """The recipe is the server's, and so is the answer; a replay moves less."""
    crossed = hand_over(thought, remote, same, mode=mode)

    assert crossed.recipe_id == thought.recipe_id
    assert crossed.handoff is not None
    assert crossed.handoff.mode == mode
    expected = remote.generate("where?", context=thought, max_tokens=6)
    assert same.generate("where?", context=crossed, max_tokens=6).token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("mode", "done", "vectors"), [(None, "reread", 0), ("projection", "projection", 1), ("text", "text", 0)]
)
def test_another_model_reads_what_was_read(
    remote: RemoteEngine,
    other: LatentEngine,
    thought: RemoteContext,
    mode: CrossingMode | None,
    done: str,
    vectors: int,
) -> None:
    """By default its text alone; asked for, its vector as well; or what the source says. Never its system prompt."""
    crossed = hand_over(thought, remote, other, mode=mode, text_tokens=8)

    assert crossed.fingerprint == other.fingerprint
    assert crossed.handoff is not None
    assert crossed.handoff.mode == done
    assert sum(len(s) for s in crossed.lineage if isinstance(s, LatentSegment)) == vectors
    told = str(other._runtime.tokenizer.decode(list(crossed.token_ids())))
    assert (FACT in told) is (done != "text")
    assert "secret" not in told
    assert other.generate("where?", context=crossed, max_tokens=2).finish_reason


def test_what_is_read_again_is_read_as_in_one_process(
    engine: LatentEngine, remote: RemoteEngine, other: LatentEngine, thought: RemoteContext
) -> None:
    """The target sees the same conversation, token for token, as when the source's engine is beside it."""
    local = engine.think([{"role": "system", "content": "secret"}, {"role": "user", "content": FACT}], steps=3)
    in_one_process = other.generate("where?", context=local, max_tokens=6)
    over_the_wire = other.generate("where?", context=hand_over(thought, remote, other), max_tokens=6)

    assert over_the_wire.context.token_ids() == in_one_process.context.token_ids()


def test_where_nothing_is_read_again_the_source_tells(
    remote: RemoteEngine, other: LatentEngine, thought: RemoteContext
) -> None:
    """Without text and without a vector there is nothing else to hand over."""
    crossed = hand_over(thought, remote, other, reread=False, text_tokens=8)

    assert crossed.handoff is not None
    assert crossed.handoff.mode == "text"


def test_a_mode_that_does_not_fit_is_refused(remote: RemoteEngine, other: LatentEngine, thought: RemoteContext) -> None:
    """Another model's KV-cache is of no use."""
    with pytest.raises(HandshakeError, match="can use projection, text, not kv"):
        hand_over(thought, remote, other, mode="kv")


def test_what_is_of_no_use_is_noted_and_the_next_best_taken(
    remote: RemoteEngine, same: LatentEngine, thought: RemoteContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over MCP and A2A; where a mode was asked for, the error is raised."""

    def broken(*_: object, **__: object) -> None:
        raise FrameError("cut off")

    monkeypatch.setattr(remote, "fetch", broken)
    crossed = hand_over(thought, remote, same)
    assert crossed.handoff is not None
    assert crossed.handoff.mode == "reread"
    assert sorted(crossed.handoff.notes) == ["kv: cut off", "replay: cut off"]
    with pytest.raises(FrameError):
        hand_over(thought, remote, same, mode="replay")
